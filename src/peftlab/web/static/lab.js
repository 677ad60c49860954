// A conversation with one model, or with two side by side. Texts go in as textContent only.
"use strict";

const byId = (id) => document.getElementById(id);
const LIMITS = [[0.5, "p0"], [0.2, "p1"], [0.05, "p2"], [0, "p3"]];  // least probability of each look
let messages = [];      // the conversation as the models are shown it
let pending = null;     // answers of the last turn that nobody has chosen between: {left, right, since}
let running = null;     // what stops the answers that are being written

function make(kind, className, text = "") {
  const element = document.createElement(kind);
  element.className = className;
  element.textContent = text;
  return element;
}

function alarm(message) {
  byId("alert").hidden = !message;
  byId("alert-text").textContent = message;
}

function busy(on) {
  document.body.dataset.busy = on;
  byId("send").hidden = on;
  byId("stop").hidden = !on;
  for (const id of ["left-model", "right-model", "compare", "new"]) byId(id).disabled = on;
  byId("right-model").disabled = on || !byId("compare").checked;
}

async function post(path, body, signal) {
  let reply;
  try {
    reply = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. If it was stopped, start it again and open the new link.");
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => ({ error: { message: "the reply cannot be read" } }));
  throw new Error(told.error.message);
}

// The events of a stream, one JSON value each.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function settings() {
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  return {
    temperature: number("temperature"), top_p: number("top-p"), max_tokens: number("max-tokens"), seed: number("seed"),
  };
}

class Answer {
  constructor(model, title) {
    this.model = model;
    this.tokens = [];
    this.text = "";
    this.at = -1;
    this.card = make("section", "answer");
    this.body = make("p", "text");
    this.note = make("p", "note quiet");
    this.card.append(make("h2", "", title), this.body, this.note);
    Object.assign(this.body, { dir: "auto", tabIndex: 0 });
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", `Reply of ${model}; arrow keys walk its tokens`);
    this.body.addEventListener("pointerover", (event) => this.read(this.spans().indexOf(event.target)));
    this.body.addEventListener("pointerleave", () => this.read(-1));
    this.body.addEventListener("focus", () => this.read(0));
    this.body.addEventListener("blur", () => this.read(-1));
    this.body.addEventListener("keydown", (event) => this.walk(event));
  }

  spans() {
    return [...this.body.children];
  }

  add(text, tokens) {
    this.text += text;
    for (const token of tokens) {
      this.tokens.push(token);
      const likely = Math.exp(token.logprob);
      const look = "token " + LIMITS.find(([least]) => likely >= least)[1];
      // The space before a word stands outside: at the end of a line it would be a sliver of colour. Before the first
      // word it would be an indentation.
      const [, space, word] = /^( ?)([^]*)$/.exec(token.token);
      this.body.append(word && this.tokens.length > 1 ? space : "", make("span", look, word || space));
    }
  }

  async write(signal) {
    const body = { model: this.model, messages: shown(), stream: true, logprobs: true, top_logprobs: 3, ...settings() };
    const reply = await post("/v1/chat/completions", body, signal);
    for await (const event of events(reply)) {
      const [choice] = event.choices;
      this.add(choice.delta.content ?? "", choice.logprobs?.content ?? []);
      this.finish = choice.finish_reason;
    }
    if (!this.text) this.body.append(make("span", "quiet", "(an empty reply)"));
    this.sum();
  }

  sum() {
    const count = this.tokens.length;
    const mean = this.tokens.reduce((sum, token) => sum + token.logprob, 0) / Math.max(1, count);
    const cut = this.finish === "length" ? ", cut at the most tokens" : this.finish ? "" : ", stopped";
    this.note.textContent = `${count} tokens${cut}; mean log-probability ${signed(mean)}`;
  }

  async score(scorer) {
    const asked = shown().at(-1).content;
    const reply = await post("/v1/score", { model: scorer, prompt: asked, completion: this.text });
    const { score, parts } = (await reply.json()).data[0];
    const names = Object.entries(parts).map(([name, value]) => `${name} ${signed(value)}`);
    this.note.textContent += `; score ${signed(score)}` + (names.length > 1 ? ` (${names.join(", ")})` : "");
  }

  walk(event) {
    const last = this.tokens.length - 1;
    const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.read(Math.min(Math.max(to, 0), last));
  }

  // Show what is known of a token; -1 for none.
  read(at) {
    const spans = this.spans();
    spans[this.at]?.classList.remove("at");
    this.at = at;
    const token = this.tokens[at];
    byId("readout").textContent = token ? told(token, at) : "\u00a0";
    spans[at]?.classList.toggle("at", Boolean(token));
  }
}

const signed = (value) => (value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(2);
const percent = (logprob) => (100 * Math.exp(logprob)).toPrecision(2) + "%";

function told(token, at) {
  const others = token.top_logprobs.filter((other) => other.token !== token.token);
  const known = others.map((other) => `${JSON.stringify(other.token)} ${signed(other.logprob)}`);
  const rest = known.length ? `; others: ${known.join(", ")}` : "";
  return `token ${at + 1} ${JSON.stringify(token.token)}: log-probability ${signed(token.logprob)}, ` +
    `${percent(token.logprob)}${rest}`;
}

function shown() {
  const system = byId("system").value.trim();
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

async function send() {
  const text = byId("text").value;
  if (document.body.dataset.busy === "true" || !text.trim()) return;
  if (pending) settle("left");
  alarm("");
  byId("hello").hidden = true;
  byId("text").value = "";
  messages.push({ role: "user", content: text });
  const asked = make("li", "mine"), said = make("p", "text", text), row = make("li", "theirs");
  said.dir = "auto";
  asked.append(make("h2", "", "You"), said);
  const compared = byId("compare").checked;
  const left = new Answer(byId("left-model").value, (compared ? "Left: " : "") + byId("left-model").value);
  const right = compared ? new Answer(byId("right-model").value, "Right: " + byId("right-model").value) : null;
  row.classList.toggle("two", compared);
  row.append(left.card, ...(right ? [right.card] : []));
  byId("turns").append(asked, row);
  await written(right ? [left, right] : [left], [asked, row], text);
}

// The newest turn stands right above the footer, which would cover the end of what is scrolled into view otherwise.
function toEnd() {
  window.scrollTo(0, document.documentElement.scrollHeight);
}

// Let the answers write themselves; a turn that came to nothing is taken back.
async function written(answers, rows, text) {
  running = new AbortController();
  busy(true);
  toEnd();
  const ends = await Promise.allSettled(answers.map((answer) => answer.write(running.signal)));
  const stopped = running.signal.aborted;
  running = null;
  const failed = ends.find((end) => end.status === "rejected" && end.reason.name !== "AbortError");
  if (stopped) for (const answer of answers) answer.sum();
  if (failed) alarm(failed.reason.message);
  if (failed || answers.every((answer) => stopped && !answer.text)) {
    messages.pop();
    for (const row of rows) row.remove();
    byId("text").value = byId("text").value || text;
    busy(false);
    return;
  }
  await scored(answers);
  pending = { left: answers[0], right: answers[1], since: performance.now() };
  if (answers.length === 1 || stopped) settle("left");
  else judged(true);
  busy(false);
  byId("status").textContent = answers.length === 1 ? "The reply is complete." : "Both replies are complete.";
  toEnd();
}

async function scored(answers) {
  const scorer = byId("scorer").value;
  if (!scorer) return;
  const ends = await Promise.allSettled(answers.map((answer) => answer.score(scorer)));
  const failed = ends.find((end) => end.status === "rejected");
  if (failed) alarm(failed.reason.message);
}

// One answer goes on as the model's turn.
function settle(side) {
  messages.push({ role: "assistant", content: pending[side].text });
  pending = null;
  judged(false);
}

function judged(open) {
  byId("judge").hidden = !open;
  if (open && byId("text").value === "") byId("judge").focus();
}

async function choose(choice) {
  if (!pending || running || document.body.dataset.busy === "true") return;
  const { left, right, since } = pending;
  const side = (answer) => ({ model: answer.model, text: answer.text });
  const body = {
    messages: shown(), left: side(left), right: side(right), choice, seconds: (performance.now() - since) / 1000,
  };
  busy(true);
  try {
    const { kept } = await (await post("/lab/preference", body)).json();
    const better = choice === "tie" ? "left" : choice;
    if (choice !== "tie") pending[better].card.classList.add("better");
    pending[better].note.textContent += `; ${choice === "tie" ? "a tie" : "better"}, kept as pair ${kept}`;
    settle(better);
    byId("status").textContent = `Kept as pair ${kept}.`;
    byId("text").focus();
  } catch (error) {
    alarm(error.message);
  } finally {
    busy(false);
  }
}

function begin() {
  messages = [];
  pending = null;
  judged(false);
  byId("turns").replaceChildren();
  byId("hello").hidden = false;
  alarm("");
  byId("text").focus();
}

async function open() {
  try {
    const reply = await fetch("/lab/models");
    const told = await reply.json();
    if (!reply.ok) throw new Error(told.error.message);
    const texts = told.models.filter((model) => model.kind === "text");
    const option = (model) => new Option(model.id, model.id);
    for (const id of ["left-model", "right-model"]) byId(id).replaceChildren(...texts.map(option));
    byId("right-model").selectedIndex = texts.length > 1 ? 1 : 0;
    byId("scorer").append(...told.models.filter((model) => model.kind === "score").map(option));
    busy(false);
  } catch (error) {
    alarm(error.message || "The server does not answer.");
  }
}

byId("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", begin);
byId("dismiss").addEventListener("click", () => alarm(""));
byId("compare").addEventListener("change", () => busy(false));
for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => choose(button.dataset.choice));
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") running?.abort();
  if (event.target.matches("input, select, textarea")) return;
  const choice = { 1: "left", 2: "right", t: "tie" }[event.key.toLowerCase()];
  if (choice) choose(choice);
});

open();
