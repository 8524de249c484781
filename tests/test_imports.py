"""Who may import whom, and who may name a mesh axis: read from the source of every room."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "layers", "models", "training", "lra", "tasks", "configs", "cli")
EVERYTHING = tuple(f"longwave.{room}" for room in ROOMS)

# Modules that only say what the others promise each other.
INTERFACES = (
    "longwave.kernels.partition",
    "longwave.layers.mixer",
    "longwave.models.inputs",
    "longwave.training.task",
)

# What a task is made of: a head, and batches in the loop's order.
TASKS = (*INTERFACES, "longwave.models.heads", "longwave.training.classification")
TASKS += ("longwave.training.files", "longwave.training.pipeline")

# Room -> what of Longwave it may import: packages with all that is in them, or single modules.
INSIDE = {
    "kernels": ("longwave.kernels",),
    "layers": ("longwave.kernels", "longwave.layers"),
    "models": ("longwave.kernels.partition", "longwave.layers", "longwave.models"),
    "training": (*INTERFACES, "longwave.training"),
    "lra": (*TASKS, "longwave.lra", "longwave.tasks.build", "longwave.tasks.images_data"),
    "tasks": (*TASKS, "longwave.models.language_model", "longwave.tasks"),
    "configs": ("longwave.training.run", "longwave.configs"),
    "cli": EVERYTHING,
    "train.py": EVERYTHING,
}
ARRAYS = {"jax", "numpy", "einops", "jaxtyping"}
LOOP = {"absl", "etils", "grain", "matplotlib", "optax", "orbax", "rich", "tensorboardX", "tqdm", "wandb"}
DATA = {"absl", "array_record", "etils", "grain", "rich", "tensorflow_datasets", "tqdm"}

# Room -> what it may import of other people's. The first three load with what `pip install longwave` brings.
OUTSIDE = {
    "kernels": ARRAYS,
    "layers": ARRAYS | {"flax"},
    "models": ARRAYS | {"flax"},
    "training": ARRAYS | LOOP | {"flax"},
    "lra": ARRAYS | DATA | {"flax", "PIL"},
    "tasks": ARRAYS | DATA | {"flax", "tokenizers"},
    "configs": {"beartype", "etils", "gin"},
    "cli": ARRAYS | LOOP | DATA | {"flax", "gin"},
    "train.py": ARRAYS | LOOP | {"flax"},
}
KNOW_GIN = ("configs/loader.py", "train.py", "cli/")

AXES = {"replica", "data", "fsdp", "seq", "tensor"}
UNMISTAKABLE = {"replica", "fsdp"}  # no other thing is called so
TAKE_AXES = {"Axes", "Mesh", "NamedSharding", "P", "PartitionSpec", "make_mesh", "shard_map"}
TAKE_AXES |= {"all_gather", "all_to_all", "axis_index", "axis_size", "pmax", "pmean", "pmin", "ppermute"}
TAKE_AXES |= {"psum", "psum_scatter"}
# Besides the table of shardings: the contract suite makes a mesh of its own to hold a mixer to.
NAME_AXES = ("training/sharding.py", "layers/contract_forms.py")


def sources() -> list[str]:
    rooms = (path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in (*rooms, *ROOT.glob("train.py")))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that the source imports, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def forbidden_imports(path: str, source: str) -> list[str]:
    room = path.split("/")[0]
    found = []
    for name in imports(ast.parse(source)):
        top = name.split(".")[0]
        if top == "longwave":
            allowed = any(f"{name}.".startswith(f"{package}.") for package in INSIDE[room])
        elif top == "gin":
            allowed = path.startswith(KNOW_GIN)
        else:
            allowed = top in OUTSIDE[room] or top in sys.stdlib_module_names
        if not allowed:
            found.append(f"{path} imports {name}")
    return found


def name_of(node: ast.expr) -> str:
    """The last part of a dotted name."""
    return getattr(node, "attr", getattr(node, "id", ""))


def named_axes(path: str, source: str) -> list[str]:
    """Mesh axes as string literals: in what takes axes (calls, `.shape[...]`), the unmistakable anywhere."""
    if path in NAME_AXES:
        return []
    tree = ast.parse(source)
    suspects: set[ast.AST] = set()
    for node in ast.walk(tree):
        takes_axes = isinstance(node, ast.Call) and name_of(node.func) in TAKE_AXES
        is_shape = isinstance(node, ast.Subscript) and name_of(node.value) == "shape"
        if takes_axes or is_shape:
            suspects.update(ast.walk(node))
    literals = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [
        f"{path}:{n.lineno} names the mesh axis {n.value!r}"
        for n in literals
        if n.value in UNMISTAKABLE or (n.value in AXES and n in suspects)
    ]


def test_rooms_import_only_what_stands_below_them():
    assert [f for path in sources() for f in forbidden_imports(path, (ROOT / path).read_text())] == []


def test_only_the_table_of_shardings_names_mesh_axes():
    assert [f for path in sources() for f in named_axes(path, (ROOT / path).read_text())] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/a.py", "from longwave.layers import S4D"),
        ("kernels/a.py", "import flax"),
        ("layers/a.py", "from longwave import models"),
        ("layers/a.py", "def f():\n    import optax"),
        ("layers/a.py", "from layers.mixer import Mixer"),
        ("layers/a.py", "from .mixer import Mixer"),
        ("models/a.py", "from longwave.kernels.attention import attention"),
        ("models/a.py", "from longwave.training.task import Task"),
        ("training/a.py", "from longwave.layers.s4d import S4D"),
        ("training/a.py", "from longwave.lra import listops"),
        ("training/a.py", "import gin"),
        ("lra/a.py", "from longwave.training.step import make_train_step"),
        ("lra/a.py", "import tensorflow as tf"),
        ("configs/check.py", "import gin"),
        ("train.py", "from models import backbone"),
    ],
)
def test_a_forbidden_import_is_found(path, source):
    assert len(forbidden_imports(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "kernels/a.py",
            "import jax.numpy as jnp\nfrom collections import abc\nfrom longwave.kernels import partition",
        ),
        (
            "training/a.py",
            "from longwave.layers.mixer import Context\nfrom longwave.models.inputs import Tokens",
        ),
        ("configs/loader.py", "import gin"),
        ("train.py", "import gin\nfrom longwave.layers.s4d import S4D"),
    ],
)
def test_an_allowed_import_is_let_through(path, source):
    assert forbidden_imports(path, source) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("P('data', None)", 1),
        ("jax.lax.psum(x, axis_name=('data', 'seq'))", 2),
        ("n = mesh.shape['tensor']", 1),
        ("order = ['replica']", 1),
        ("batch['data']; watch('data')", 0),  # words of other trades
        ("'''The data axis: P('fsdp').'''", 0),
        ("P(axes.batch)", 0),
    ],
)
def test_a_named_axis_is_found(source, found):
    assert len(named_axes("kernels/a.py", source)) == found


def test_every_package_folder_is_listed_in_pyproject():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {f"longwave.{Path(path).parent}".replace("/", ".") for path in sources() if "/" in path}
    assert set(setuptools["packages"]) == folders
    assert set(setuptools["package-dir"]) == {f"longwave.{room}" for room in ROOMS}
    bare = [name for name in folders if not Path(ROOT, *name.split(".")[1:], "__init__.py").exists()]
    assert bare == []
