"""The chat's terminal: read a turn, stream a reply, and the commands in between."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ..data.records import Message
from ..errors import PeftlabError, UserError
from ..models.catalog import known_names, named
from ..models.personas import AUTO, persona_files
from ..sampling.sampler import Decoding
from . import saved
from .keyboard import hushed
from .router import DEFAULT as ROUTER
from .router import Router
from .score import DEFAULT as REWARD
from .score import Scorer
from .screen import Screen
from .session import Session, default_decoding, transcript
from .voices import OFF, Cast, Voice, weights_of

SETTINGS: dict[str, Callable[[str], Any]] = {"temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int}


def told(decoding: Decoding) -> str:
    """The settings as one would type them."""
    return "  ".join(f"{key}={getattr(decoding, key):g}" for key in SETTINGS)


def exchanges(turns: int) -> str:
    """So many turns as what a person counts: a turn of theirs and its reply are one exchange."""
    return f"{turns // 2} exchange{'' if turns // 2 == 1 else 's'}"


HELP = f"""\
/help                  this list
/adapter NAME          let an adapter or a model answer (off: the bare base)
/adapter               which there are
/mix a=0.7 b=0.3       a weighted sum of adapters: plain LoRA on one base
/persona NAME          answer as a persona (auto: one is picked for each turn;
                       off: who answered before, as before)
/compare A B [TEXT]    two answers side by side, to TEXT or to your last turn;
                       A and B are adapters, personas, models or off
/score on|off          what a reward says of each reply, part by part
/system TEXT           set the system text (alone: none)
/set KEY=VALUE         {", ".join(SETTINGS)}
/set                   the settings now
/history               the turns so far
/undo                  take back your last turn and its reply
/retry                 another reply to your last turn
/clear                 forget the conversation
/save FILE.jsonl       write the conversation as a row to train on
/load FILE.jsonl       go on with a conversation
/status                who answers, and how full the context is
/quit                  leave (also Ctrl+D)
Ctrl+C                 stop a reply; what was said is kept
Alt+Enter, or a \\ at the end of a line, begins another line of your turn"""


class Terminal:
    """A read-eval-print loop over a session."""

    def __init__(
        self,
        session: Session,
        read: Callable[[], str],
        out: TextIO | None = None,
        cast: Cast | None = None,
        reward: str = REWARD,
        router: str | Router = ROUTER,
    ) -> None:
        """`cast`: where other voices come from; `reward` and `router`: what /score and /persona auto load.

        A router that is loaded picks from the first turn on.
        """
        self.session, self.read, self.screen = session, read, Screen(out or sys.stdout)
        self.cast = cast or Cast()
        self.reward = reward
        self.router = router if isinstance(router, Router) else None  # while it picks who answers
        self.router_name = router if isinstance(router, str) else router.classifier.name
        self.scoring = False
        self._before: Session | None = None  # as it was when a persona took over
        self._scorers: dict[tuple[str, str], Scorer] = {}
        self._written: Path | None = None
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.screen.note(HELP),
            "/adapter": self.adapter,
            "/mix": self.mix,
            "/persona": self.persona,
            "/compare": self.compare,
            "/score": self.score,
            "/system": self.system,
            "/set": self.set,
            "/history": lambda _: self.screen.note("\n".join(transcript(session.turns)) or "(nothing yet)"),
            "/undo": self.undo,
            "/retry": self.retry,
            "/clear": self.clear,
            "/save": self.save,
            "/load": self.load,
            "/status": self.status,
        }

    def run(self) -> None:
        """Until /quit or the end of input."""
        self.greet()
        while True:
            try:
                turn = self.read().strip()
                if turn == "/quit":
                    return
                if turn.startswith("/"):
                    self.command(turn)
                elif turn:
                    self.answer(turn)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.screen.note("(/quit or Ctrl+D leaves)")
            except PeftlabError as error:
                self.screen.note(f"({error})")

    def command(self, line: str) -> None:
        """Run one /command; a wrong one is answered, never fatal."""
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise UserError(f"unknown command {name}; /help lists them")
        self.commands[name](rest.strip())

    def words(self, line: str) -> Sequence[str]:
        """What may follow the beginning of a command, for the Tab key."""
        if not line.startswith("/"):
            return []
        if " " not in line:
            return [*self.commands, "/quit"]
        names = {"/adapter": self._adapters, "/mix": self._adapters, "/persona": lambda: [*persona_files(), AUTO]}
        names["/compare"] = lambda: [*self._adapters(), *persona_files(), *known_names()]
        return names.get(line.partition(" ")[0], lambda: [])()

    def greet(self) -> None:
        """Two lines: who answers and how, and where the commands are."""
        who = f"{self.session.voice.label}, {self._manner()}"
        if self.router is not None:
            who = self._routed()
        self.screen.note(f"{who}\n/help lists the commands, /quit leaves")

    def answer(self, text: str) -> None:
        """Stream the reply to one turn."""
        if self.router is not None:
            choice = self.router.pick(text)
            self.screen.note(f"({choice.told()})")
            if self.session.voice.label != choice.persona:
                self._speak_as(self.cast.persona(choice.persona))
        before = self.session.dropped
        pieces = self.session.reply(text)
        try:
            with hushed():
                self.screen.stream(self._speaker(self.session.voice), pieces)
            if not self.session.turns[-1].content.strip():
                self.screen.note("(nothing: the model ended its reply at once; /retry asks again)")
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
        context = f"the context of {self.session.context} tokens"
        if before == 0 and self.session.dropped:
            self.screen.note(f"({context} is full: oldest turns are dropped from now on)")
        if self.session.cut:
            self.screen.note(f"(your turn is longer than {context}: its beginning was cut)")
        if self.scoring and self.session.turns[-1].content:
            self.screen.note(f"({self._scored(self.session.voice.asked(text), self.session.turns[-1].content)})")

    def adapter(self, name: str) -> None:
        voice = self.session.voice
        if not name:
            acting = "  ".join(f"{n}={w:g}" for n, w in voice.weights.items()) or "none"
            loaded = ", ".join(self._adapters()) or "none"
            self.screen.note(f"acting: {acting}; loaded on {voice.base}: {loaded}")
            return
        self._go_on(self.cast.off(voice) if name == OFF else self.cast.stack(named(name)))

    def mix(self, text: str) -> None:
        weights = {named(name): weight for name, weight in weights_of(text).items()}
        self._go_on(self.cast.mix(self.session.voice, weights))

    def persona(self, name: str) -> None:
        if not name:
            self.screen.note(f"personas: {', '.join(persona_files())}; auto picks one for each turn, off ends it")
        elif name == AUTO:
            self.router = Router.load(self.router_name, self.cast.device)
            self.screen.note(f"({self._routed()})")
        elif name == OFF:
            self._end_persona()
        else:
            self._go_on(self.cast.persona(name))

    def compare(self, text: str) -> None:
        names, turns = text.split(maxsplit=2), [*self.session.turns]
        if len(names) < 2:
            raise UserError("/compare: give two, for example /compare enthusiast critic")
        if len(names) == 3:
            turns.append(Message("user", names[2]))
        elif turns:
            turns.pop()  # the reply that was given
        else:
            raise UserError("/compare: no turn yet; give a text, for example /compare enthusiast critic This film")
        asides = []
        for name in names[:2]:
            voice = self.cast.find(name, self.session.voice)
            try:
                with hushed():
                    said = "".join(self.session.aside(voice, turns))
            finally:
                self.session.voice.act()
            if self.scoring:
                said += "\n\n" + self._scored(voice.asked(turns[-1].content), said)
            asides.append(said)
        self.screen.columns(names[:2], asides)

    def score(self, text: str) -> None:
        if text not in ("on", "off"):
            raise UserError("/score: give on or off")
        if text == "on":
            self.screen.note(f"(each reply is scored by {self._reward().spec})")
        else:
            self.screen.note("(no score from now on)")
        self.scoring = text == "on"

    def set(self, text: str) -> None:
        changed = self.session.decoding
        for pair in re.sub(r"\s*=\s*", "=", text).split():
            key, _, value = pair.partition("=")
            changed = replace(changed, **{key: self._number(key, value)})
        self.session.decoding = changed
        self.screen.note(told(changed))

    def _number(self, key: str, value: str) -> Any:
        if key not in SETTINGS:
            raise UserError(f"/set {key}: known keys are {', '.join(SETTINGS)}")
        try:
            number = SETTINGS[key](value)
        except ValueError:
            raise UserError(f"/set {key}: {value!r} is not a number") from None
        limit = {"max_new_tokens": self.session.context - 1, "top_p": 1}.get(key, sys.maxsize)
        zero = key in ("temperature", "top_k")
        if not (0 < number <= limit or (number == 0 and zero)):
            fits = "0 or more" if zero else f"more than 0, and {limit} at most"
            raise UserError(f"/set {key}: {number} is out of range; give {fits}")
        return number

    def system(self, text: str) -> None:
        persona = self.session.voice.persona
        if persona is not None and persona.prompt:
            raise UserError(f"/system: {persona.name} puts each question alone, without a system text")
        self.session.system = text
        self.screen.note("(each prompt begins with it)" if text else "(no system text)")

    def undo(self, _: str) -> None:
        asked = self.session.take_back()
        (told_back,) = transcript([Message("taken back", asked)]) if asked is not None else ["nothing to take back"]
        self.screen.note(f"({told_back})")

    def clear(self, _: str) -> None:
        self.session.clear()
        self.screen.note("(a new conversation)")

    def retry(self, _: str) -> None:
        asked = self.session.take_back()
        if asked is None:
            self.screen.note("(nothing to answer again)")
        else:
            self.answer(asked)

    def save(self, name: str) -> None:
        path = Path(name)
        if path.exists() and path != self._written:
            raise UserError(f"/save {name}: is there already; give another name")
        left = saved.save(path, self.session.system, self.session.turns)
        self._written = path
        without = f", without {left} of no text" if left else ""
        self.screen.note(f"({name}: {exchanges(len(self.session.turns) - 2 * left)}{without})")

    def load(self, name: str) -> None:
        system, turns, rows = saved.load(Path(name))
        self.session.clear()
        self.session.system, self.session.turns = system, turns
        more = f", the first of {rows} rows" if rows > 1 else ""
        self.screen.note(f"({name}: {exchanges(len(turns))}{more})")

    def status(self, _: str) -> None:
        session, voice, kept = self.session, self.session.voice, self.session.acting.max_new_tokens
        rows = {
            "answers": f"{voice.label}, {self._manner()}",
            "picked by": self.router_name if self.router else "you",
            "base": voice.base,
            "acting": "  ".join(f"{name}={weight:g}" for name, weight in voice.weights.items()) or "the bare base",
            "loaded": ", ".join(self._adapters()) or "no adapter",
            "device": str(session.sampler.device),
            "decoding": told(session.decoding),
            "system": session.system or "none",
            "exchanges": f"{len(session.turns) // 2}, {session.dropped // 2} of them dropped",
            "context": f"{session.used} of {session.context} tokens; {kept} kept for a reply",
            "score": self._reward().spec if self.scoring else "off",
        }
        self.screen.note("\n".join(f"{key:10} {value}" for key, value in rows.items()))

    def _go_on(self, voice: Voice) -> None:
        """Let `voice` answer from now on, picked by the user."""
        self.router = None
        self._speak_as(voice)
        voice.act()
        self.screen.note(f"({voice.label} answers, {self._manner()})")

    def _speak_as(self, voice: Voice) -> None:
        if voice.persona is not None and self.session.voice.persona is None:
            self._before = replace(self.session)
        self.session.speak_as(voice)

    def _end_persona(self) -> None:
        """Give the word back to who had it before a persona.

        Their settings and system text come back too, where those of the persona were not changed since.
        """
        now = replace(self.session)
        before = self._before if now.voice.persona is not None else now
        self._go_on(before.voice if before else self.cast.off(now.voice))
        if before is None:
            return
        brought = now.voice.persona
        own = brought is None or now.decoding != default_decoding(now.voice)
        self.session.decoding = now.decoding if own else before.decoding
        self.session.system = now.system if brought is None or now.system != brought.system else before.system

    def _reward(self) -> Scorer:
        """The persona's reward, or the chat's; loaded at first use."""
        persona = self.session.voice.persona
        spec, want = (persona.reward or self.reward, persona.want) if persona else (self.reward, "positive")
        if (spec, want) not in self._scorers:
            self._scorers[spec, want] = Scorer.load(spec, want, self.cast.device)
        return self._scorers[spec, want]

    def _scored(self, asked: str, reply: str) -> str:
        try:
            return self._reward().told(asked, reply)
        except PeftlabError as error:
            self.scoring = False
            return f"no score from now on: {error}"

    def _adapters(self) -> list[str]:
        mixer = self.session.voice.mixer
        return list(mixer.loaded) if mixer else []

    def _routed(self) -> str:
        labels = self.router.classifier.labels if self.router else []
        return f"{self.router_name} picks who answers each turn: {', '.join(labels)}"

    def _manner(self) -> str:
        voice = self.session.voice
        if voice.persona is not None and voice.persona.prompt:
            return "asked each question alone"
        return "asked by its chat template" if voice.template else "which goes on with what you write"

    @staticmethod
    def _speaker(voice: Voice) -> str:
        return voice.persona.name if voice.persona else "model"
