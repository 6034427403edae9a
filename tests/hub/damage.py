"""Ways to damage a JSON file or a safetensors header, drawn by hypothesis: what people, tools and bad disks may do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

# Values of every type, of all sizes, and some that are not JSON at all.
LEAVES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**7, -(10**9), 10**30, 0.5, -0.5, 1e-30, 1e30, 1e308),
    *(
        "",
        "cosine",
        "linear",
        "learned_monotone",
        "a" * 300,
        "\u202egnp.exe",
        "a\x00b\n\x1b[31m",
        "../../etc",
        "hf://x/y",
    ),
    *([], [None], [1, 2], ["a"], [[1]], {}, {"name": "x"}, {"a": {"b": []}}, [0.1] * 50),
    *({"name": "learned_monotone", "config": {"hidden_features": 10**9}}, {"name": "tabulated", "config": {}}),
    *(["diffusers", "UNet2DModel"], ["vdm_hub", "VDMScheduler"], ["os", "system"], [None, None]),
]
_NO_JSON = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 5000, b"'a'", b"nan", b"01", b"0x10"]
_CHANGES = ("value", "value", "value", "gone", "added", "renamed", "twice", "no json", "bytes")
_MARK = "0123-here-comes-no-json"


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value, the value itself included; of long lists the first entries."""
    yield prefix
    children = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths_of(child, (*prefix, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with something else at a path; ``...`` takes it away."""
    if not path:
        return new
    first, rest = path[0], path[1:]
    items = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and not rest:
        del items[first]
    else:
        items[first] = changed(items[first], rest, new)
    return items


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON file with one change, or two."""
    value = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        places = list(paths_of(value))
        path = draw(st.sampled_from(places))
        how = draw(
            st.sampled_from(["value", "value", "value", "gone", "added", "renamed", "twice", "no json", "bytes"])
        )
        if how == "bytes":
            return draw(damaged_bytes(json.dumps(value).encode()))
        if how == "no json":
            text = json.dumps(changed(value, path, _MARK)).encode()
            return text.replace(json.dumps(_MARK).encode(), draw(st.sampled_from(_NO_JSON)))
        if how == "twice" and isinstance(value, dict) and value:
            key = draw(st.sampled_from(sorted(value)))
            again = f'"{key}": {json.dumps(draw(st.sampled_from(LEAVES)))}, '
            return b"{" + again.encode() + json.dumps(value).encode()[1:]
        if how == "gone" and path:
            value = changed(value, path, ...)
        elif how == "added" and isinstance(value, dict):
            value = value | {draw(st.sampled_from(["extra", "_private", "nun_levels", "../x", "\u202ea", ""])): 1}
        elif how == "renamed" and path and isinstance(path[0], str) and isinstance(value, dict):
            value = {f"{key}x" if key == path[0] else key: child for key, child in value.items()}
        else:
            value = changed(value, path, draw(st.sampled_from(LEAVES)))
    return json.dumps(value).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, within: int | None = None) -> bytes:
    """A file with a bit flipped, cut short, or with bytes put in or overwritten; where asked, in its first bytes."""
    last = max(0, min(len(content), within or len(content)) - 1)
    at = draw(st.integers(0, last))
    how = draw(st.sampled_from(["flip", "cut", "insert", "overwrite"]))
    if how == "cut" or not content:
        return content[:at]
    if how == "flip":
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    new = draw(st.sampled_from([b"\x00", b"\xff\xfe", b"{", b'"', b"\xe2\x80\xae", b"9" * 20, bytes(64)]))
    return content[:at] + new + content[at + (0 if how == "insert" else len(new)) :]


@st.composite
def damaged_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header says something else of its tensors."""
    if draw(st.booleans()):
        return draw(damaged_bytes(content, within=400))
    size = int.from_bytes(content[:8], "little")
    header = draw(damaged_json(content[8 : 8 + size]))
    if draw(st.booleans()):
        header = header.replace(b'"F32"', draw(st.sampled_from([b'"I64"', b'"BOOL"', b'"F64"', b'"F16"', b'"X"'])))
    length = draw(st.sampled_from([len(header), len(header), len(header), 0, 2**63, size]))
    return length.to_bytes(8, "little") + header + content[8 + size :]
