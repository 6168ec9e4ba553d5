import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.layout import FfnLayoutConfig, LayoutConfig, expand, expand_layers, parse


def test_patterns_read_as_documented() -> None:
    assert parse("3*gdn attn") == ("gdn", "gdn", "gdn", "attn")
    assert parse("2*(a 2*b) c") == ("a", "b", "b", "a", "b", "b", "c")
    assert parse("") == ()
    assert parse("2*(2*(x) y)") == ("x", "x", "y") * 2


names = st.sampled_from(["attn", "gdn", "swa"])
items = st.recursive(
    names.map(lambda name: (name, (name,))),
    lambda inner: st.tuples(st.integers(1, 3), st.lists(inner, min_size=1, max_size=3)).map(
        lambda pair: (
            f"{pair[0]}*({' '.join(text for text, _ in pair[1])})",
            tuple(name for _, names in pair[1] for name in names) * pair[0],
        )
    ),
    max_leaves=6,
)


@given(st.lists(items, min_size=1, max_size=4))
def test_any_nesting_reads_as_written_out(parts: list[tuple[str, tuple[str, ...]]]) -> None:
    text = " ".join(part for part, _ in parts)
    assert parse(text) == tuple(name for _, written in parts for name in written)


@given(st.text(alphabet="ab 3*()", max_size=12))
def test_any_text_is_read_or_refused_with_itself(text: str) -> None:
    names: tuple[str, ...] = ()
    try:
        names = parse(text)
    except ValueError as error:
        said = str(error)
    else:
        said = text
    assert text in said
    assert all(name.isidentifier() for name in names)


@given(
    depth=st.integers(1, 20),
    pattern=st.lists(names, min_size=1, max_size=5),
    first=st.lists(names, max_size=3),
    last=st.lists(names, max_size=3),
)
def test_ends_override_a_pattern_tiled_by_absolute_index(depth, pattern, first, last) -> None:
    arguments = (" ".join(pattern), " ".join(first), " ".join(last), depth)
    if len(first) + len(last) > depth:
        with pytest.raises(ValueError, match="depth"):
            expand(*arguments)
        return
    layers = expand(*arguments)
    assert len(layers) == depth
    for index, name in enumerate(layers):
        if index < len(first):
            assert name == first[index]
        elif index >= depth - len(last):
            assert name == last[index - depth]
        else:
            assert name == pattern[index % len(pattern)]


@pytest.mark.parametrize("text", ["3*", "0*a", "(a", "a)", "2*)", "()", "a+b", "3 * * a", "*a"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse(text)


def layout(pattern: str, ffn: str) -> LayoutConfig:
    line = FfnLayoutConfig(pattern=ffn, first="", last="")
    return LayoutConfig(pattern=pattern, first="", last="", ffn=line)


def test_unknown_names_and_empty_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layout\.pattern: 'atn' .* did you mean attn"):
        expand_layers(layout("3*gdn atn", "moe"), 4, ["gdn", "attn"])
    with pytest.raises(ValueError, match="layer 1 has neither"):
        expand_layers(layout("gdn none", "moe none"), 4, ["gdn"])
