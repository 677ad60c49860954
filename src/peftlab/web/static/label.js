// One page, one state: what the server said last. Texts go in as textContent only; every choice waits for its reply.
"use strict";

const byId = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "choose-left", ArrowRight: "choose-right", t: "choose-tie", s: "choose-skip", u: "undo" };
let state = null;   // the server's last word
let shownAt = 0;    // when the pair came up
let busy = false;   // a request is on its way: nothing may be said of a pair meanwhile

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  let reply;
  try {
    reply = await fetch("/label/" + path, options);
  } catch {
    throw { message: "The server does not answer. If it was stopped, start the same command again and open the new link: " +
      "what was saved is still there." };
  }
  const told = await reply.json().catch(() => ({ error: { message: "the reply cannot be read" } }));
  if (!reply.ok) throw { status: reply.status, message: told.error.message };
  return told;
}

// A lost reply may have been written: nothing is sent twice, the state is asked for instead.
async function change(path, body, done) {
  if (busy) return;
  work(true);
  try {
    state = await ask(path, { position: state.position, ...body });
    alarm("");
    done();
  } catch (error) {
    if (error.status === 409) await load("Labelled in another tab in the meantime; this is where the work stands.");
    else alarm(error.message);
  } finally {
    work(false);
  }
}

async function load(told = "") {
  try {
    const before = state === null ? -1 : state.position;
    state = await ask("state");
    alarm("");
    if (state.position !== before) show(told);
  } catch (error) {
    alarm(error.message);
  }
}

async function refresh(told) {
  work(true);
  await load(told);
  work(false);
}

function choose(choice) {
  if (busy || state.pair === null) return;
  const seconds = Math.max(0, (performance.now() - shownAt) / 1000);
  change("choose", { id: state.pair.id, choice, seconds }, () => show("Saved."));
}

function show(told) {
  const { pair, done, total } = state;
  shownAt = performance.now();
  byId("file").textContent = state.file;
  byId("count").textContent = done + " of " + total;
  byId("progress").max = total;
  byId("progress").value = done;
  byId("pair").hidden = pair === null;
  byId("done").hidden = pair !== null;
  byId("actions").hidden = false;
  byId("agreement").hidden = pair === null;
  for (const button of document.querySelectorAll("[data-choice]")) button.hidden = pair === null;
  byId("finish").hidden = pair !== null;
  byId("undo").ariaDisabled = done === 0;  // `disabled` would take the focus away
  byId("agreement-text").textContent = agreement();
  if (pair !== null) {
    // The space that parts an answer from its prompt would be an indentation.
    for (const part of ["prompt", "left", "right"]) byId(part).textContent = pair[part].replace(/^ /, "");
    window.scrollTo(0, 0);
  } else {
    result();
    byId("done-title").focus();
  }
  byId("status").textContent = told + " " + (pair === null ? "All pairs are labelled." : `Pair ${done + 1} of ${total}.`);
}

function agreement() {
  const { decided, chosen, agreement: share, interval } = state.summary;
  if (!decided) return "No winner yet.";
  const percent = (value) => (100 * value).toFixed(0) + "%";
  return `${chosen} of ${decided}, ${percent(share)} (95% interval ${percent(interval[0])} to ${percent(interval[1])}).`;
}

function result() {
  const { decided, tie, skip, left } = state.summary;
  const rows = [
    ["Agreement with the file", agreement()], ["The left answer won", `${left} of ${decided}`],
    ["Ties", tie], ["Skipped", skip],
  ];
  byId("result").replaceChildren(...rows.flatMap(([name, value]) => {
    const term = document.createElement("dt"), detail = document.createElement("dd");
    term.textContent = name;
    detail.textContent = value;
    return [term, detail];
  }));
}

function alarm(message) {
  byId("alert").hidden = !message;
  byId("alert-text").textContent = message;
}

function work(on) {
  busy = on;
  document.body.dataset.busy = on;
}

function closed() {
  for (const part of ["pair", "done", "actions"]) byId(part).hidden = true;
  byId("closed").hidden = false;
  state = null;
}

for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => choose(button.dataset.choice));
byId("undo").addEventListener("click", () => state.done && change("undo", {}, () => show("Taken back.")));
byId("finish").addEventListener("click", () => change("finish", {}, closed));
byId("retry").addEventListener("click", () => refresh("Up to date."));

document.addEventListener("keydown", (event) => {
  // A key held down would label pairs that nobody has read.
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const button = byId(KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key] ?? "");
  if (button === null || button.hidden || byId("actions").hidden) return;
  event.preventDefault();
  button.click();
});
// A tab that comes back to the front shows what another one did.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !busy && state !== null) refresh("Another tab went on.");
});

refresh();
