"""Checks of the arguments of public kernels."""

import functools
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.fake_tensors import fake_outputs

P = ParamSpec("P")
R = TypeVar("R")

WHOLE = (torch.int32, torch.int64)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require(is_met: bool, name: str, expected: object, found: object) -> None:
    """Raises ValueError that names the argument, what it must be, and what it is."""
    if not is_met:
        raise refusal(name, expected, found)


def refusal(name: str, expected: object, found: object) -> ValueError:
    """The error that names the argument, what it must be, and what it is."""
    return ValueError(f"{name}: expected {expected}, found {found}")


def require_within(name: str, x: Tensor, low: int, high: int, ignored: int | None = None) -> None:
    """Refuses whole numbers outside [low, high) but for `ignored`.

    On the CPU it raises ValueError. On a GPU nothing waits: the device stops with an assertion that names the
    argument.
    """
    if x.numel() == 0 or x.is_meta:
        return
    if ignored is not None:
        x = x.masked_fill(x == ignored, low)
    least, most = torch.aminmax(x)
    if x.is_cuda:
        message = f"{name}: expected numbers from {low} to {high - 1}"
        torch._assert_async((least >= low) & (most < high), message)  # pyright: ignore[reportPrivateImportUsage]
    elif x.device.type == "cpu" and not torch.compiler.is_compiling():
        expected = f"numbers from {low} to {high - 1}"
        require(low <= int(least) and int(most) < high, name, expected, f"{int(least)} to {int(most)}")


def require_order(name: str, x: Tensor | None) -> None:
    """Refuses numbers that fall along the last dim; on a GPU as `require_within`."""
    if x is None or x.shape[-1] < 2 or x.is_meta:
        return
    falls = (x[..., 1:] < x[..., :-1]).any()
    if x.is_cuda:
        message = f"{name}: expected numbers that never fall along a row"
        torch._assert_async(~falls, message)  # pyright: ignore[reportPrivateImportUsage]
    elif x.device.type == "cpu" and not torch.compiler.is_compiling():
        require(not bool(falls), name, "numbers that never fall along a row", "some that do")


class _Dim(NamedTuple):
    """A dim of an annotation: its name, or its size where that is a number; `#` also lets 1 stand for it."""

    name: str
    size: int | None
    may_be_one: bool


class _Shape(NamedTuple):
    """What a tensor argument may be: `front` dims, as many more where one is `open`, then `back` dims."""

    text: str
    front: tuple[_Dim, ...]
    back: tuple[_Dim, ...]
    open: str
    dtypes: tuple[torch.dtype, ...]

    def fits(self, ndim: int) -> bool:
        least = len(self.front) + len(self.back)
        return ndim >= least if self.open else ndim == least


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises ValueError for tensors that do not fit the annotations of its signature.

    Shapes and dtypes are those of jaxtyping; dims of one name are equal over all arguments, and all tensors
    are on the device of the first. Whole numbers are int32 or int64. Fake tensors
    (FakeTensorMode) give fake tensors.
    """
    parameters = inspect.signature(function).parameters
    shapes = {name: _shapes(parameter.annotation) for name, parameter in parameters.items()}
    shapes = {name: found for name, found in shapes.items() if found}
    others = {name: _others(parameters[name].annotation) for name in shapes}
    names = tuple(parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        sizes: dict[str, object] = {}
        device: torch.device | None = None
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name not in shapes:
                continue
            if not isinstance(value, Tensor):
                if not isinstance(value, others[name]):
                    raise refusal(name, "a tensor", type(value).__name__)
                continue
            device = value.device if device is None else device
            _check(name, value, shapes[name], sizes, device)
        if any(isinstance(value, FakeTensor) for value in (*args, *kwargs.values())):
            return fake_outputs(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def _shapes(annotation: Any) -> tuple[_Shape, ...]:
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return tuple(_shape(option) for option in options if hasattr(option, "dim_str"))


def _others(annotation: Any) -> tuple[type, ...]:
    """What else than a tensor an argument may be."""
    return tuple(option for option in get_args(annotation) if not hasattr(option, "dim_str"))


def _shape(annotation: Any) -> _Shape:
    dims = annotation.dim_str.split()
    cut = next((index for index, dim in enumerate(dims) if dim.startswith("*")), len(dims))
    dtypes = WHOLE if "int32" in annotation.dtypes else FLOATING
    front, back = (tuple(_dim(dim) for dim in part) for part in (dims[:cut], dims[cut + 1 :]))
    return _Shape(annotation.dim_str, front, back, "".join(dims[cut : cut + 1]), dtypes)


def _dim(text: str) -> _Dim:
    name = text.removeprefix("#")
    return _Dim(name, int(name) if name.isdigit() else None, text.startswith("#"))


def _check(
    argument: str, x: Tensor, shapes: tuple[_Shape, ...], sizes: dict[str, object], device: torch.device
) -> None:
    # Every kernel call comes here for each of its tensors: texts are made for errors alone.
    found = x.shape
    ndim = len(found)
    shape = next((shape for shape in shapes if shape.fits(ndim)), None)
    if shape is None:
        raise refusal(argument, " or ".join(f"[{shape.text}]" for shape in shapes), tuple(found))
    if x.dtype not in shape.dtypes:
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in shape.dtypes)
        raise refusal(argument, dtypes, x.dtype)
    if x.device != device:
        raise refusal(argument, f"on {device}, as the arguments before it", x.device)
    behind = ndim - len(shape.back)
    for dim, size in (*zip(shape.front, found, strict=False), *zip(shape.back, found[behind:], strict=False)):
        if dim.may_be_one and size == 1:
            continue
        known = dim.size if dim.size is not None else sizes.setdefault(dim.name, size)
        if known != size:
            raise refusal(argument, _expected(shape, dim.name, known), tuple(found))
    if shape.open:
        middle = tuple(found[len(shape.front) : behind])
        known = sizes.setdefault(shape.open, middle)
        if known != middle:
            raise refusal(argument, _expected(shape, shape.open, known), tuple(found))


def _expected(shape: _Shape, name: str, known: object) -> str:
    return f"[{shape.text}] with {name} = {known}, as in the arguments before it"
