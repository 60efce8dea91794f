"""Mutations of bytes, of JSON and of specs, drawn by hypothesis."""

import json

from hypothesis import strategies as st

SPEC = """problem: made.py:made
problem_args: {hidden: 8, where: [a, b], more: {deep: 1.5}}
params: ['*', '!0.*']
blocks: [[0.weight, 0.weight], [0.weight, 2.bias]]
engine: auto
dtype: float64
formats: [zarr, parquet]
chunk: 64
tile: [2, 3]
memory: 2GiB
resources: {own: 1.5}
label_selector: {ray.io/kind: in(a, b)}
tile_deadline: 3.5
output: memory://out
"""
YAML = st.sampled_from([
    "&a [*a]", "*a", "&a {b: *a}", "!!python/name:os.system", "!!binary x", "!!set {a}", "2024-99-99", "1:99", "0x",
    ".inf", "9" * 5000, "[" * 100, "{a: " * 100, "? [", "<<: [1]", "'", '"\\x00"', '"\\uD800"', "null", "~", "no", "-",
    "|", ">9", "1e999", "-1", "0", "%YAML 9", "---", "...", "\t", "#", ":", "\u202e", "\x85", "[/bold]",
    "\x1b[2J", "http://u:p@h",
])  # fmt: skip
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63, 10**12, 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["[/bold]", "\x1b[2J", "all", "factored", "../..", "c/0/0", "a" * 10**5]),
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)),
)


def places(value, path=()):
    """The paths of all values of plain data."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*path, key))


def of_json(data, whole):
    """One or a few values replaced, taken away or doubled."""
    whole = {"": json.loads(whole)}
    for _ in range(data.draw(st.integers(1, 3))):
        paths = [path for path in places(whole) if path]
        *parents, last = data.draw(st.sampled_from(paths))
        inside = whole
        for parent in parents:
            inside = inside[parent]
        how = (
            data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "double"])) if parents else "replace"
        )
        if how == "remove":
            del inside[last]
        elif how == "double" and isinstance(inside, list):
            inside.insert(last, inside[last])
        elif how == "double":
            inside[f"{last}2"] = inside[last]
        else:
            inside[last] = data.draw(VALUES)
    return json.dumps(whole[""]).encode()


def of_bytes(data, whole):
    """Bits, cuts and runs of zeros."""
    at, to = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    how = data.draw(st.sampled_from(["flip", "cut", "zeros", "double", "insert"]))
    if how == "flip":
        at = min(at, len(whole) - 1)
        return whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :]
    middle = {
        "cut": b"",
        "zeros": bytes(to - at),
        "double": 2 * whole[at:to],
        "insert": data.draw(st.binary(max_size=40)),
    }
    return whole[:at] + middle[how] + whole[to:]


def of_spec(data):
    """Values and pieces of lines replaced."""
    lines = SPEC.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        k = data.draw(st.integers(0, len(lines) - 1))
        key, _, value = lines[k].partition(": ")
        at = data.draw(st.integers(0, len(value)))
        piece = data.draw(st.one_of(YAML, st.text(max_size=5)))
        lines[k] = f"{key}: {piece}" if data.draw(st.booleans()) else f"{key}: {value[:at]}{piece}{value[at:]}"
    return "\n".join(lines).encode(errors="surrogatepass")
