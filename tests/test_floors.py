"""The import fences of the design: floors of the package, and which third-party packages each part may know."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module imports from the floors below its own and, on its own floor, from what stands to its left.
FLOORS = (
    (
        *("linearard", "linearard.errors", "linearard.tree"),
        *("linearard.config_keys", "linearard.config_checks", "linearard.config"),
    ),
    (
        *("linearard.ds_config", "linearard.parallel", "linearard.logs", "linearard.schedule", "linearard.layout"),
        "linearard.cluster",
    ),
    (
        "linearard.data",
        "linearard.profiling",
        "linearard.capture",
        "linearard.teacher_tensors",
        "linearard.head_loss",
        "linearard.losses",
        "linearard.metrics",
        "linearard.relation_mode",
        "linearard.costs",
        "linearard.plan",
        "linearard.checkpoint",
        "linearard.models",
        "linearard.models.decoder",
        "linearard.models.rope",
        "linearard.models.student",
        "linearard.models.teacher",
    ),
    ("linearard.engine", "linearard.evaluation"),
    ("linearard.trainer",),
    ("linearard.train", "linearard.doctor", "tools"),
)
RANK = {name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)}
MAY_IMPORT_DEEPSPEED = ("linearard.engine", "linearard.parallel", "linearard.checkpoint", "tools")


def _module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _unit(module: str) -> str:
    """The longest name of `FLOORS` that holds the module: linearard.data.corpus -> linearard.data."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in RANK:
            return ".".join(parts[:end])
    raise KeyError(module)


def _imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute names of everything that a module imports, anywhere in it; `from a import b` gives a and a.b."""
    found: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def _climbing(module: str, imports: set[str]) -> set[str]:
    """Those imports that the floors forbid."""
    own = _unit(module)
    bad = set()
    for name in imports:
        if name.split(".")[0] not in ("linearard", "tools"):
            continue
        other = _unit(name)
        # `from linearard import x` names the package, too; the package itself holds nothing.
        if other != own and RANK[other] > RANK[own]:
            bad.add(name)
    return bad


def _knows(imports: set[str], package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports)


FILES = sorted([*(ROOT / "linearard").rglob("*.py"), *(ROOT / "tools").glob("*.py")])
KERNELS = sorted((ROOT / "kernels" / "relation_kl").rglob("*.py"))
IMPORTS = {
    _module_name(file): _imports(file.read_text(), _module_name(file), file.name == "__init__.py")
    for file in [*FILES, *KERNELS]
}
OURS = [name for name in IMPORTS if name.split(".")[0] in ("linearard", "tools")]


def test_every_module_has_a_floor() -> None:
    assert set(OURS) >= {name for names in FLOORS for name in names if name not in ("tools",)}
    # Only the package itself may fall back to the bare name: a new module must be given its place above.
    assert [name for name in OURS if _unit(name) == "linearard"] == ["linearard"]


@pytest.mark.parametrize("module", OURS)
def test_imports_come_from_lower_floors(module: str) -> None:
    assert _climbing(module, IMPORTS[module]) == set()


def test_deepspeed_is_imported_only_where_it_may_be() -> None:
    knowing = [name for name in OURS if _knows(IMPORTS[name], "deepspeed")]
    assert {_unit(name) for name in knowing} <= set(MAY_IMPORT_DEEPSPEED)
    assert "linearard.engine" in knowing and "linearard.parallel" in knowing
    bridge = [name for name in OURS if _knows(IMPORTS[name], "transformers.integrations.deepspeed")]
    assert bridge == ["linearard.engine"]


def test_triton_is_imported_only_by_kernels() -> None:
    assert [name for name in OURS if _knows(IMPORTS[name], "triton")] == []
    assert any(_knows(IMPORTS[name], "triton") for name in IMPORTS)


def test_config_and_ds_config_know_no_torch() -> None:
    for name in (*FLOORS[0], "linearard.ds_config", "linearard.schedule"):
        assert not any(_knows(IMPORTS[name], package) for package in ("torch", "transformers", "numpy")), name


def test_kernels_know_nothing_of_the_trainer() -> None:
    for module, imports in IMPORTS.items():
        if module.split(".")[0] == "relation_kl":
            forbidden = [p for p in ("linearard", "deepspeed", "transformers", "tools") if _knows(imports, p)]
            assert forbidden == [], module


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import linearard.config, linearard.ds_config", ("torch", "deepspeed", "transformers", "triton")),
        ("import linearard.train", ("torch", "deepspeed", "transformers")),  # --help and cheap checks are quick
        ("import relation_kl", ("linearard", "deepspeed", "transformers")),
    ],
)
def test_imports_load_nothing_heavy(statement: str, forbidden: tuple[str, ...]) -> None:
    code = f"{statement}; import sys; print([name for name in {forbidden!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_fence_notices_a_violation() -> None:
    source = "from linearard import engine\nfrom .corpus import x\ndef f():\n    from linearard.models.rope import y\n"
    imports = _imports(source, "linearard.data.packing")
    assert "linearard.data.corpus" in imports
    assert _climbing("linearard.data.packing", imports) == {
        "linearard.engine", "linearard.models.rope", "linearard.models.rope.y",
    }  # fmt: skip
    assert _climbing("linearard.capture", {"linearard.data.corpus", "linearard.losses"}) == {"linearard.losses"}
    assert _climbing("linearard.doctor", {"tools.demo", "linearard.train"}) == {"tools.demo"}
    assert _knows({"triton.language"}, "triton") and not _knows({"tritonclient"}, "triton")
