"""Specs as strangers may write them: by kind, the text of a file, with what the line says where it is refused."""

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}], y{k}: 1}}\n" for k in range(1, 40))


def _of(line):
    return f"problem: made.py:f\noutput: out\n{line}\n"


REFUSED = {
    "a list within itself": (_of("problem_args: {a: &a [*a]}"), "an alias of what it lies in"),
    "a mapping within itself": (_of("problem_args: &a {b: *a}"), "an alias of what it lies in"),
    "its own key": (_of("problem_args: &a {? *a : 1}"), "an alias of what it lies in"),
    "deep lists": (_of(f"blocks: {'[' * 5000}{']' * 5000}"), "deeper than 32 levels"),
    "deep mappings": (_of(f"problem_args: {'{a: ' * 5000}1{'}' * 5000}"), "deeper than 32 levels"),
    "deep dashes": (_of(f"params:\n  {'- ' * 5000}a"), "deeper than 32 levels"),
    "no date": (_of("problem_args: {d: 2024-99-99}"), "line 3, column 19: what is written here is no timestamp"),
    "no time": (_of("problem_args: {d: !!timestamp x}"), "is no timestamp"),
    "no truth": (_of("problem_args: {d: !!bool x}"), "is no bool"),
    "no number": (_of("chunk: !!int x"), "is no int"),
    "5,000 digits": (_of(f"chunk: {'9' * 5000}"), "a number of 5,000 characters"),
    "5,000 digits before a point": (_of(f"tile_deadline: {'9' * 5000}.0"), "a number of 5,002 characters"),
    "a number of sixties": (_of(f"chunk: 1{':59' * 20000}"), "a number of 60,001 characters"),
    "a billion laughs": (_of(LAUGHS), "more than 20,000 values, aliases written out"),
    "a billion merges": (_of(MERGES), "more than 20,000 values, aliases written out"),
    "many values": (_of(f"params: [{'a,' * 50000}]"), "more than 20,000 values"),
    "a large file": (_of(f"params: [{'a,' * 200000}]"), "expected at most 262,144"),
    "Python": (_of("problem_args: !!python/object/apply:os.system [id]"), "could not determine a constructor"),
    "unhashable keys": (_of("problem_args: {[a]: 1}"), "found unhashable key"),
    "keys of numbers": ("1: 2", "unknown key `1`"),
    "an anchor of nothing": (_of("params: *nothing"), "undefined alias"),
    "two documents": (_of("---\na: 1"), "another document"),
    "zeros": ("\0" * 100, "characters that YAML does not allow"),
    "no text": (b"problem: \xff\xfe\xfa", "characters that YAML does not allow"),
    "nothing": ("", "got a NoneType"),
    "a text": ("problem", "got a str"),
    "a chunk beyond all": (_of("chunk: 1" + "0" * 90), "less than 2147483648"),
    "endless": (_of("tile_deadline: .inf"), "finite number"),
    "no number of seconds": (_of("tile_deadline: .nan"), "finite number"),
    "no memory": (_of("memory: 1e400GiB"), "`memory` got"),
    "memory in a list": (_of("memory: [1]"), "`memory` got"),
    "a long value": (_of(f"engine: {'x' * 10**5}"), "(100,002 characters)"),
    "a long key": (_of(f"{'x' * 1000}: 1"), "unknown key"),
    "arguments in a list": (_of("problem_args: [a]"), "`problem_args`"),
    "arguments by number": (_of("problem_args: {1: a}"), "`problem_args`"),
    **{
        f"blocks {value}": (_of(f"blocks: {value}"), "`blocks` got")
        for value in ("1", "{a: b}", "[[a]]", "[[a, b, c]]", "[a]", "[{a: b}]", "[[[a], b]]", "[[1, 2]]", "[null]", "")
    },
}
FACTORIES = {
    "..x:f": "expected names with dots between",
    ".:f": "expected names with dots between",
    "a..b:f": "expected names with dots between",
    "os;x:f": "expected names with dots between",
    ":f": "expected `file.py:factory`",
    "made.py": "expected `file.py:factory`",
    "made.py:": "has no function ``",
    "os:sep": "has no function `sep`",
    "a\0b.py:f": "no file",
    f"{'x' * 300}.py:f": "no file",
    "leaves.py:f": "raised SystemExit",
    "broken.py:f": "raised SyntaxError",
    "made.py:leaves": "raised SystemExit",
    "made.py:many": "raised RuntimeError: one two",
}
SOURCES = {
    "made.py": "import sys\ndef leaves():\n    sys.exit(0)\ndef many():\n    raise RuntimeError('one\\ntwo')\n",
    "leaves.py": "raise SystemExit(0)\n",
    "broken.py": "def f(:\n",
}
