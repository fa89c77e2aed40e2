"""Where the settings are found, and what bad ones say."""

from __future__ import annotations

from pathlib import Path

import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from sandstorm._errors import InvalidInput, SettingsError
from sandstorm._settings import MAX_BYTES, Settings, default_store_url, load_settings, settings_of


def write(place: Path, content: str | bytes = 'strategy = "fastest"\n') -> Path:
    """A file with parents."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content.encode() if isinstance(content, str) else content)
    return place


def test_without_a_file_there_are_defaults(tmp_path: Path) -> None:
    """The first run needs no settings."""
    assert load_settings(environ={"HOME": str(tmp_path)}, cwd=tmp_path) == Settings()


def test_the_places_are_asked_in_order(tmp_path: Path) -> None:
    """The argument, then the variable, the working directory, and the user's own file."""
    user = write(tmp_path / "home" / ".config" / "sandstorm" / "sandstorm.toml")
    environ = {"HOME": str(tmp_path / "home")}
    assert load_settings(environ=environ, cwd=tmp_path).path == str(user)
    xdg = write(tmp_path / "xdg" / "sandstorm" / "sandstorm.toml")
    environ["XDG_CONFIG_HOME"] = str(tmp_path / "xdg")
    assert load_settings(environ=environ, cwd=tmp_path).path == str(xdg)
    here = write(tmp_path / "sandstorm.toml")
    assert load_settings(environ=environ, cwd=tmp_path).path == str(here)
    named = write(tmp_path / "named.toml")
    environ["SANDSTORM_SETTINGS"] = str(named)
    assert load_settings(environ=environ, cwd=tmp_path).path == str(named)
    given_path = write(tmp_path / "given.toml")
    assert load_settings(given_path, environ=environ, cwd=tmp_path).path == str(given_path)


def test_a_relative_base_directory_counts_as_unset(tmp_path: Path) -> None:
    """As the XDG specification has it."""
    url = default_store_url({"HOME": str(tmp_path), "XDG_STATE_HOME": "relative"})
    assert url == f"sqlite:///{tmp_path}/.local/state/sandstorm/sandstorm.db"
    assert default_store_url({"XDG_STATE_HOME": "/state"}) == "sqlite:////state/sandstorm/sandstorm.db"


def test_everything_that_a_file_may_say(tmp_path: Path) -> None:
    """Every key arrives, and a plugin with a table or in `require` is a required one."""
    place = write(
        tmp_path / "s.toml",
        """
        strategy = "balanced"
        store = "sqlite:////tmp/x.db"
        providers = ["local"]
        keep = "results"
        require = ["e2b"]
        disable = ["modal"]
        [plugins.local]
        since = 2025-01-31
        """,
    )
    read = load_settings(place)
    assert (read.strategy, read.store, read.providers) == ("balanced", "sqlite:////tmp/x.db", ("local",))
    assert (read.keep, read.disable) == ("results", ("modal",))
    assert read.required == {"local", "e2b"}
    assert str(read.plugins["local"]["since"]) == "2025-01-31"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("strategie = 'x'", "sandstorm.toml: strategie: expected a key that exists (did you mean 'strategy'?), got 'strategie'"),
        ("strategy = 3", "sandstorm.toml: strategy: expected the name of a strategy, got 3"),
        ("keep = 'all'", "sandstorm.toml: keep: expected one of everything, results, nothing, got 'all'"),
        ("providers = 'local'", "sandstorm.toml: providers: expected a list of accounts, got 'local'"),
        ("providers = ['a', 1]", "sandstorm.toml: providers[1]: expected text, got 1"),
        ("plugins = 3", "sandstorm.toml: plugins: expected a table of names and values, got 3"),
        ("plugins.local = 3", "sandstorm.toml: plugins.local: expected a table of names and values, got 3"),
        ("path = 'x'", "sandstorm.toml: path: expected a key that exists, got 'path'"),
        ("require = ['a']\ndisable = ['a']", "sandstorm.toml: disable: expected plugins that are not asked for elsewhere"),
        ("strategy = ", "sandstorm.toml: expected TOML, got 'Invalid value (at"),
        (b"\xff", "sandstorm.toml: expected TOML, got \"'utf-8' codec"),
        ("a = " + "[" * 5000, "sandstorm.toml: expected TOML, got"),
        (b"#" * (MAX_BYTES + 1), f"{{path}}: expected at most {MAX_BYTES} bytes"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_file_is_one_line_that_names_file_and_key(tmp_path: Path, content: str | bytes, line: str) -> None:
    """The line says where in which file, what was expected and what came."""
    place = write(tmp_path / "sandstorm.toml", content)
    with pytest.raises(SettingsError) as caught:
        load_settings(place)
    assert str(caught.value).startswith(line.replace("{path}", str(place)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("by_variable", [True, False])
def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path, by_variable: bool) -> None:
    """A misspelt path does not silently mean the defaults."""
    missing = tmp_path / "missing.toml"
    with pytest.raises(SettingsError, match=r"missing\.toml: expected a file that can be read"):
        load_settings(None if by_variable else missing, environ={"SANDSTORM_SETTINGS": str(missing)})


def test_what_stands_in_a_default_place_must_be_readable(tmp_path: Path) -> None:
    """A directory or a dangling link in the place of the file is said, not skipped."""
    (tmp_path / "sandstorm.toml").mkdir()
    with pytest.raises(SettingsError, match="Is a directory"):
        load_settings(environ={"HOME": str(tmp_path)}, cwd=tmp_path)
    (tmp_path / "sandstorm.toml").rmdir()
    (tmp_path / "sandstorm.toml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="No such file"):
        load_settings(environ={"HOME": str(tmp_path)}, cwd=tmp_path)


def test_a_path_that_no_file_can_have_is_one_line() -> None:
    """NUL and line breaks in a path neither crash nor break the line."""
    for path in ("a\0b", "a\nb"):
        with pytest.raises(SettingsError) as caught:
            load_settings(path)
        assert "\n" not in str(caught.value)


def test_settings_errors_are_input_errors() -> None:
    """One `except InvalidInput` catches both."""
    with pytest.raises(InvalidInput):
        settings_of({"keep": 1})


_keys = st.sampled_from(["strategy", "store", "providers", "keep", "require", "disable", "plugins", "path"])


@given(st.dictionaries(_keys | st.text(max_size=5), strategies.json_values, max_size=6))
@settings(max_examples=300, deadline=None)
def test_whatever_table_is_fed_only_settings_errors_are_raised(data: dict[str, object]) -> None:
    """A table becomes settings or one located line."""
    try:
        settings_of(data, "/etc/sandstorm.toml")
    except SettingsError as exc:
        assert exc.field.startswith("sandstorm.toml: ")
        assert len(str(exc).splitlines()) == 1


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
@settings(max_examples=100, deadline=None)
def test_whatever_file_is_read_only_settings_errors_are_raised(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Any bytes are settings or one line."""
    place = tmp_path_factory.getbasetemp() / "any.toml"
    place.write_bytes(content)
    try:
        load_settings(place)
    except SettingsError as exc:
        assert len(str(exc).splitlines()) == 1
