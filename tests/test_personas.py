"""Personas: files that are read strictly, and the verbs around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stacks
import tiny
from commands import peftlab

from peftlab.errors import UserError
from peftlab.models import personas
from peftlab.models.personas import SHIPPED, Persona, load_persona, persona_files


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """The working folder and the home folder, both without personas."""
    found = {"here": tmp_path / "here" / "personas", "home": tmp_path / "home" / "personas"}
    for folder in found.values():
        folder.mkdir(parents=True)
    monkeypatch.chdir(found["here"].parent)
    monkeypatch.setenv("PEFTLAB_HOME", str(found["home"].parent))
    return found


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text("\n".join([f'name = "{name}"', *lines]))
    return path


def test_three_are_shipped_and_speak_on_one_bundled_base():
    assert [path.stem for path in sorted(SHIPPED.glob("*.toml"))] == ["critic", "enthusiast", "explainer"]
    for name in persona_files():
        persona = load_persona(name)
        assert persona.base == "tiny-gpt2" and persona.adapter and persona.description
    assert peftlab("personas check").code == 0, "bundled adapters whole, on that base"


def test_the_nearest_file_of_a_name_counts(places):
    write(places["home"], "critic", 'base = "a"')
    assert load_persona("critic").base == "a"
    write(places["here"], "critic", 'base = "b"')
    assert load_persona("critic").base == "b"
    assert load_persona(str(places["home"] / "critic.toml")).base == "a"


@pytest.mark.parametrize(
    ("lines", "said"),
    {
        ('base = "a"', 'sistem = "x"'): "unknown key sistem; did you mean system?",
        ('base = "a"', "[decoding]", "temprature = 1"): "did you mean decoding.temperature?",
        ('base = "a"', "[decoding]", "top_p = 0"): "decoding.top_p",
        ('base = "a"', "[decoding]", "temperature = nan"): "decoding.temperature",
        ('base = "a"', 'adapter = "x"', "[mix]", "y = 1"): "adapter and mix: give one of them",
        ('base = "a"', "[mix]", 'y = "much"'): "mix.y",
        ('base = "a"', "[mix]", "y = inf"): "mix.y",
        ('base = "a"', 'prompt = "no place"'): "prompt: give {text} once",
        ('base = "a"', 'prompt = "{text}"', 'system = "x"'): "system: does nothing where `prompt`",
        ('base = " "',): "base: give a model",
        ("base = 1",): "base",
        (): "base: field required",
        ("base = ",): "not valid TOML",
    }.items(),
)
def test_a_wrong_file_is_one_line_that_names_file_and_key(places, lines, said):
    path = write(places["here"], "mine", *lines)
    with pytest.raises(UserError) as caught:
        load_persona("mine")
    assert said in str(caught.value) and str(path.relative_to(path.parent.parent)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_name_and_file_agree(places):
    path = write(places["here"], "mine", 'base = "a"')
    path.rename(path.with_name("other.toml"))
    with pytest.raises(UserError, match="they must agree"):
        load_persona("other")


@pytest.mark.parametrize("name", ["../mine", "a/b", "", "auto", "off", "a b", "x" * 65, "..", "crtic"])
def test_what_is_no_name_reaches_no_file(places, name):
    write(places["here"].parent, "mine", 'base = "a"')
    with pytest.raises(UserError, match="no such persona"):
        load_persona(name)
    with pytest.raises(ValueError, match="a name is") if name != "crtic" else pytest.raises(UserError):
        load_persona(name) if name == "crtic" else Persona(name=name, base="a")


def test_new_writes_what_check_and_show_read(places, tmp_path):
    base = str(tiny.causal_folder(tmp_path / "base"))
    made = stacks.adapters(base, tmp_path)
    line = f"personas new polite --base {base} --adapter {made['plain']}=0.6 --adapter {made['other']}=0.4 --system hi"
    assert peftlab(line).out.strip() == "personas/polite.toml"
    assert load_persona("polite").weights == {made["plain"]: 0.6, made["other"]: 0.4}
    assert peftlab("personas check polite").out == "polite: ok\n"
    assert 'system = "hi"' in peftlab("personas show polite").out
    again = peftlab(line)
    assert again.code == 2 and "is there already" in again.err
    assert peftlab(f"personas new calm --base {base} --home").code == 0 and (places["home"] / "calm.toml").is_file()
    for wrong, said in {
        f"above --base {base} --adapter {made['dora']}=1": "uses DoRA; only plain LoRA can be mixed",
        f"far --base tiny-gpt2 --adapter {made['plain']}": f"stands on {base}, not on tiny-gpt2",
        f"twice --base {made['plain']}": "is no causal language model",
    }.items():
        assert peftlab(f"personas new {wrong}").code == 0
        checked = peftlab(f"personas check {wrong.split()[0]}")
        assert checked.code == 2 and said in checked.out


def test_a_base_may_be_a_run_of_yours(places):
    (places["here"].parent / "runs" / "mine").mkdir(parents=True)
    (places["here"].parent / "runs" / "mine" / "config.toml").touch()
    assert peftlab("personas new own --base mine").code == 0 and load_persona("own").base == "runs/mine"


@pytest.mark.parametrize("name", ["../mine", "auto"])
def test_new_refuses_what_is_no_name(places, name):
    done = peftlab(f"personas new {name}")
    assert done.code == 2 and "a name is 1 to 64" in done.err
    assert not list(places["here"].parent.rglob("*.toml"))


def test_a_broken_file_hides_no_other_in_the_list(places):
    write(places["here"], "broken", "base = 1")
    done = peftlab("personas list")
    assert done.code == 0 and "broken: personas/broken.toml: base" in done.out and "enthusiast" in done.out
    rows = json.loads(peftlab("personas list --json").out)
    assert {row["persona"]: row["file"] for row in rows}["broken"] == str(personas.places()[0] / "broken.toml")
