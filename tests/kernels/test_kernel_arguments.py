"""Kernels and device functions take few arguments: what belongs together comes as one tuple."""

import ast
from pathlib import Path

MOST = 25
KERNELS = Path(__file__).parents[2] / "kernels"


def is_compiled(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_kernel_takes_more_arguments_than_a_reader_can_follow() -> None:
    counts = {}
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and is_compiled(node):
                arguments = node.args
                parts = (arguments.posonlyargs, arguments.args, arguments.kwonlyargs)
                counts[f"{path.relative_to(KERNELS)}: {node.name}"] = sum(map(len, parts))
    assert len(counts) > 100
    assert {name: count for name, count in counts.items() if count > MOST} == {}
