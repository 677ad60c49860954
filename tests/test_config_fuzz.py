"""Every shipped config with random keys and values: a good config, or one message that names the key."""

from __future__ import annotations

import string
import tomllib

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from peftlab.config import Config, keys, load_config, shipped_configs, to_toml
from peftlab.errors import UserError
from peftlab.recipes import load

SHIPPED = {name: load(tomllib.loads(path.read_text())["recipe"]).CONFIG for name, path in shipped_configs().items()}
KNOWN = sorted({key for config in SHIPPED.values() for key in keys(config)})

names = st.sampled_from(KNOWN) | st.text(string.ascii_letters + "._-", min_size=1, max_size=12)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-3, 40) | st.floats(width=64)
    | st.text(max_size=12) | st.sampled_from(["auto", "lora", "all-linear", "nan", "inf", "1e400", "[", "{}", "a,b"])
)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(string.ascii_letters, min_size=1), scalars)
# As typed behind the equals sign: anything that a shell lets through.
typed = values.map(str) | st.text(max_size=20).map(lambda text: text.replace("\0", "")) | st.sampled_from(
    ["[1, 2]", "{a = 1}", '"', "'''", "[[", "true", "0x10", "1_0", "2026-11-25", "1e-3\nlr = 3", "\\u0", "\U0010ffff"]
)


def accepted(config: type[Config], source: str, pairs: list[str], mentioned: list[str]) -> None:
    """The config holds again what is written of it, or the error is of one line a key and names one of them."""
    try:
        found = load_config(config, source, pairs)
    except UserError as error:
        assert any(name and name.split(".")[0].strip() in str(error) for name in mentioned), (str(error), mentioned)
        return
    assert config.model_validate(tomllib.loads(to_toml(found))) == found


@given(name=st.sampled_from(sorted(SHIPPED)), pairs=st.lists(st.tuples(names, typed), min_size=1, max_size=3))
@example(name="sft-tiny", pairs=[("lora.r.x", "1")])
@example(name="sft-tiny", pairs=[("columns.text.x", "1")])
@example(name="sft-tiny", pairs=[("lora", "1"), ("lora.r", "1")])
@example(name="sft-tiny", pairs=[(".", "1")])
@settings(max_examples=400)
def test_overrides(name, pairs):
    accepted(SHIPPED[name], name, [f"{key}={text}" for key, text in pairs], [key for key, _ in pairs])


@given(name=st.sampled_from(sorted(SHIPPED)), key=names, value=values)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files(name, key, value, tmp_path_factory):
    """The shipped file with one key's line written otherwise."""
    file = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    table = tomllib.loads(shipped_configs()[name].read_text())
    assume("." not in key)
    table[key] = value
    try:
        text = to_toml({k: v for k, v in table.items() if v is not None})
        tomllib.loads(text)
    except (TypeError, ValueError):  # nothing that TOML can hold
        assume(False)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    accepted(SHIPPED[name], str(file), [], [key, "fuzzed.toml"])


@given(data=st.binary(max_size=80))
@settings(max_examples=200)
def test_bytes_that_are_no_config(data, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "noise.toml"
    file.write_bytes(data)
    accepted(SHIPPED["sft-tiny"], str(file), [], ["noise.toml"])


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_what_ships_is_good_and_spells_only_known_keys(name):
    load_config(SHIPPED[name], name)
    spelled = set(tomllib.loads(shipped_configs()[name].read_text()))
    assert spelled <= {key.split(".")[0] for key in keys(SHIPPED[name])}
