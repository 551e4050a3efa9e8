"""Names, plugins, and the check of parameters against constructors."""

from __future__ import annotations

import enum
import importlib.metadata
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from loguru import logger
from pydantic import Field

from aetheria.errors import ConfigError, PluginError, RegistryError
from aetheria.registry import Kind, Registry


@pytest.fixture(autouse=True)
def _isolated():
    with Registry.isolated():
        yield


class Shape(enum.Enum):
    ROUND = "round"
    SQUARE = "square"


class Everything:
    """Remembers what it was called with."""

    def __init__(
        self,
        count: int,
        rate: float = 0.1,
        pair: tuple[int, float] = (1, 2.0),
        path: Path | None = None,
        shape: Shape = Shape.ROUND,
        mode: Literal["min", "max"] = "min",
        names: Sequence[str] = (),
        sizes: Iterable[int] = (),
        share: Annotated[float, Field(le=1)] = 1.0,
        either: int | str = 0,
        implicit: int = None,  # type: ignore[assignment]  # noqa: RUF013 - users write this
        unknown: OnlyForTypeCheckers = None,  # type: ignore[name-defined]  # noqa: F821
        unchecked: Everything | None = None,
        bare=None,
    ) -> None:
        self.arguments = dict(locals())


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_registered_class_is_found_by_its_name_and_the_name_by_the_class():
    assert Registry.register_model("one")(Everything) is Everything
    assert Registry.get("model", "one") is Everything
    assert Registry.name_of("model", Everything) == "one"
    assert Registry.name_of("data", Everything) is None
    assert "one" in Registry.names("model")
    assert "one" not in Registry.names("data")


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_has_a_decorator(kind):
    getattr(Registry, f"register_{kind}")("mine")(Everything)
    assert Registry.build(kind, "mine", {"count": 3}).arguments["count"] == 3


def test_the_same_class_defined_again_replaces_the_first():
    def define() -> type:
        @Registry.register_model("mine")
        class Net: ...

        return Net

    define()
    second = define()
    assert Registry.get("model", "mine") is second


def test_a_name_for_two_classes_is_refused_and_both_are_named():
    Registry.register_model("mine")(Everything)
    with pytest.raises(RegistryError) as caught:
        Registry.register_model("mine")(Shape)
    message = str(caught.value)
    assert message.startswith("found the model name 'mine' twice: ")
    assert f"{__name__}.Everything ({__file__}) has it" in message
    assert f"{__name__}.Shape ({__file__}) wants it" in message


def test_a_decorator_without_a_name_is_refused():
    with pytest.raises(RegistryError, match=r"expected a string. Write @Registry.register_model\('a name'\)"):
        Registry.register_model(Everything)  # type: ignore[arg-type]


def test_an_unknown_name_lists_the_near_ones():
    Registry.register_loss("huber")(Everything)
    with pytest.raises(RegistryError, match=r"unknown loss 'hubber', .* Did you mean 'huber'\?"):
        Registry.get("loss", "hubber")
    with pytest.raises(RegistryError, match=r"@Registry.register_loss\('hubber'\) in plugins/ beside the config"):
        Registry.build("loss", "hubber")


def test_isolation_forgets_what_was_registered_inside():
    with Registry.isolated():
        Registry.register_model("inside")(Everything)
    assert "inside" not in Registry.names("model")


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def build():
    Registry.register_callback("all")(Everything)

    def build(**params: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = Registry.build("callback", "all", params).arguments
        return arguments

    return build


@pytest.mark.parametrize(
    ("name", "value", "converted"),
    [
        ("rate", 1, 1.0),
        ("pair", [3, 4], (3, 4.0)),
        ("path", "a/b", Path("a/b")),
        ("path", None, None),
        ("shape", "square", Shape.SQUARE),
        ("mode", "max", "max"),
        ("names", ["a"], ["a"]),
        ("sizes", [1, 2], [1, 2]),
        ("share", 0.5, 0.5),
        ("either", "a", "a"),
        ("implicit", None, None),
        ("unknown", {"a": 1}, {"a": 1}),
        ("bare", [1], [1]),
    ],
)
def test_parameters_become_what_they_are_annotated_with(build, name, value, converted):
    result = build(count=1, **{name: value})[name]
    assert result == converted
    assert type(result) is type(converted)


def test_objects_from_python_pass_untouched(build):
    held = object()
    assert build(count=1, unchecked=held, rate=held)["rate"] is held


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"count": "3"}, "count: found '3' (a string), expected a whole number. Correct it."),
        ({"count": True}, "count: found true, expected a whole number. Correct it."),
        ({"count": 3.7}, "count: found 3.7, expected a whole number. Correct it."),
        ({"count": 3, "pair": [1, "x"]}, "pair.1: found 'x' (a string), expected a number. Correct it."),
        ({"count": 3, "shape": "oval"}, "shape: found 'oval' (a string), expected 'round' or 'square'. Correct it."),
        ({"count": 3, "sizes": [1, "x"]}, "sizes.1: found 'x' (a string), expected a whole number. Correct it."),
        ({"count": 3, "share": 2}, "share: found 2, expected 1.0 or less. Correct it."),
        ({"count": 3, "either": 0.5}, "either: found 0.5, expected a whole number or a string. Correct it."),
        ({"count": 3, "ratte": 1}, "ratte: found an unknown parameter, expected a known one. Did you mean 'rate'?"),
        ({"count": 3, "zzz": 1}, "zzz: found an unknown parameter, expected a known one. Remove it."),
        ({}, "count: found no value, expected one, for there is no default. Add it."),
    ],
)
def test_parameters_that_do_not_fit_are_refused(build, params, message):
    with pytest.raises(ConfigError) as caught:
        build(**params)
    problem, accepted = str(caught.value).splitlines()
    assert problem == f"callback 'all': {message}"
    assert accepted.startswith("callback 'all' takes: count: int; rate: float = 0.1; pair: tuple[int, float] = ")


def test_leading_arguments_are_not_checked_and_not_asked_for():
    @Registry.register_optimizer("mine")
    def mine(parameters: list[int], rate: float = 0.1) -> tuple[Any, float]:
        return parameters, rate

    assert list(Registry.parameters("optimizer", "mine")) == ["parameters", "rate"]
    assert Registry.build("optimizer", "mine", {"rate": 1}, "anything") == ("anything", 1.0)
    with pytest.raises(ConfigError, match="parameters: found an unknown parameter"):
        Registry.build("optimizer", "mine", {"parameters": []}, "anything")


def test_a_class_without_a_constructor_takes_no_parameters():
    Registry.register_callback("bare")(type("Bare", (), {}))
    with pytest.raises(ConfigError, match=r"x: found an unknown parameter, .*\n.* takes: no parameters"):
        Registry.build("callback", "bare", {"x": 1})


def test_any_further_parameters_are_let_through_where_the_constructor_takes_them():
    @Registry.register_callback("open")
    def build_open(count: int, **others: int) -> dict[str, int]:
        return {"count": count, **others}

    assert Registry.build("callback", "open", {"count": 1, "more": "2"}) == {"count": 1, "more": "2"}


def test_the_signature_is_that_of_the_constructor_even_under_a_metaclass():
    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    class Net(metaclass=Meta):
        def __init__(self, width: int = 1) -> None:
            self.width = width

    Registry.register_model("net")(Net)
    assert Registry.build("model", "net", {"width": 3}).width == 3
    with pytest.raises(ConfigError, match="Did you mean 'width'"):
        Registry.build("model", "net", {"widht": 3})


def test_what_a_constructor_raises_passes_through():
    @Registry.register_callback("broken")
    def broken(hook: Callable[[], int] | None = None) -> None:
        raise TypeError("my own")

    with pytest.raises(TypeError, match=r"^my own$"):
        Registry.build("callback", "broken")


# --- the user's plugins ----------------------------------------------------------------------------------------------


@pytest.fixture
def plugins(tmp_path):
    """Writes a folder of plugins."""

    def plugins(project: str = "project", /, **files: str) -> Path:
        folder = tmp_path / project / "plugins"
        for name, content in files.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.py").write_text(content)
        return folder

    return plugins


NET = """
from aetheria.registry import Registry

@Registry.register_model("{0}")
class Net:
    def __init__(self, width: int = 1):
        self.width = width
"""


def test_files_and_packages_are_imported_once_and_see_one_another(plugins):
    folder = plugins(
        model=NET.format("net") + "\nimports = globals().get('imports', 0) + 1",
        data="from .model import Net\nfrom aetheria.registry import Registry\nRegistry.register_data('net')(Net)",
        _private="raise RuntimeError('not a plugin')",
        torch=NET.format("a module that is called like another one"),
    )
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("from . import inner")
    (folder / "package" / "inner.py").write_text(NET.format("inner"))
    (folder / "notes.txt").write_text("not Python")
    Registry.load_plugins(folder)
    Registry.load_plugins(folder / ".." / "plugins")
    net = Registry.get("model", "net")
    assert Registry.get("data", "net") is net
    assert Registry.build("model", "inner", {"width": 2}).width == 2
    assert sys.modules[net.__module__].imports == 1
    assert sys.modules.get("torch") is not sys.modules[net.__module__]


def test_two_projects_may_use_the_same_file_names(plugins):
    Registry.load_plugins(plugins("first.v1", model=NET.format("first")))
    Registry.load_plugins(plugins("second", model=NET.format("second")))
    assert Registry.get("model", "first").__module__ != Registry.get("model", "second").__module__


def test_two_projects_that_claim_one_name_are_both_named(plugins):
    first, second = plugins("first", model=NET.format("net")), plugins("second", model=NET.format("net"))
    Registry.load_plugins(first)
    with pytest.raises(PluginError) as caught:
        Registry.load_plugins(second)
    assert isinstance(caught.value.__cause__, RegistryError)
    assert str(first / "model.py") in str(caught.value)
    assert str(second / "model.py") in str(caught.value)


def test_a_folder_may_have_an_initialiser(plugins):
    Registry.load_plugins(plugins(__init__="WIDTH = 3", model="from . import WIDTH\n" + NET.format("net")))
    module = sys.modules[Registry.get("model", "net").__module__]
    assert module.WIDTH == 3


def test_no_folder_is_no_error(tmp_path):
    Registry.load_plugins(None)
    Registry.load_plugins(tmp_path / "plugins")


def test_isolation_forgets_folders_so_that_they_can_be_loaded_again(plugins):
    folder = plugins(model=NET.format("net"))
    with Registry.isolated():
        Registry.load_plugins(folder)
    assert "net" not in Registry.names("model")
    Registry.load_plugins(folder)
    assert "net" in Registry.names("model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "x = 1\ny = x.missing\n",
            "model.py:2: found AttributeError: 'int' object has no attribute 'missing' whil",
        ),
        ("import no_such_package\n", "model.py:1: found ModuleNotFoundError: No module named 'no_such_package' while"),
        ("def broken(:\n", "model.py: found SyntaxError: invalid syntax (model.py, line 1) while importing a plugin."),
        (
            "from other import x\n",
            "model.py:1: found ModuleNotFoundError: No module named 'other' while importing",
        ),
    ],
)
def test_a_plugin_that_raises_is_named(plugins, content, message):
    folder = plugins(model=content, other="x = 1")
    with pytest.raises(PluginError) as caught:
        Registry.load_plugins(folder)
    assert str(caught.value).startswith(f"{folder / message}")
    assert caught.value.__cause__ is not None
    assert ("with a dot: from .other import ..." in str(caught.value)) == ("from other" in content)


def test_a_plugin_can_be_corrected_and_loaded_again(plugins):
    with pytest.raises(PluginError):
        Registry.load_plugins(plugins(model="raise ValueError"))
    Registry.load_plugins(plugins(model=NET.format("net") + "# longer than before"))
    assert "net" in Registry.names("model")


def test_objects_of_plugins_reach_a_spawned_process(plugins):
    method = "    def area(self, height):\n        return self.width * height"
    Registry.load_plugins(plugins(model=NET.format("net") + method))
    net = Registry.build("model", "net", {"width": 6})
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(net.area, (7,)) == 42


# --- installed plugins -----------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a package with an entry point on the path, as pip would."""

    def installed(module: str, content: str) -> None:
        (tmp_path / f"{module}.py").write_text(content)
        information = tmp_path / f"{module}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[aetheria.plugins]\n{module} = {module}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert module in {point.value for point in importlib.metadata.entry_points(group="aetheria.plugins")}

    before = dict(Registry._installed)
    yield installed
    Registry._installed = before


def test_an_installed_plugin_is_loaded(installed):
    installed("third_party", NET.format("third"))
    Registry.load_plugins()
    assert Registry.get("model", "third").__module__ == "third_party"


def test_an_installed_plugin_that_raises_is_warned_of_once_and_remembered(installed):
    installed("broken_party", "raise OSError('no licence')")
    warnings: list[str] = []
    sink = logger.add(lambda message: warnings.append(message.record["message"]), level="WARNING")
    try:
        Registry.load_plugins()
        Registry.load_plugins()
    finally:
        logger.remove(sink)
    assert warnings == [
        "The installed plugin 'broken_party' cannot be loaded; its names are missing. Update or uninstall it."
    ]
    with pytest.raises(RegistryError, match=r"could not be loaded \(broken_party: OSError: no licence\)"):
        Registry.get("model", "qqqqqqqqqqqqqqq")
