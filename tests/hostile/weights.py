"""Checkpoints as strangers may make them: by kind, what `torch.save` writes of it, and what the line says."""

import io
import zipfile

import torch


def _within_itself():
    made = {"a": {}}
    made["a"]["b"] = made
    return made


def _shared(leaves):
    made = {"x": 1}
    for _ in range(leaves):
        made = {"a": made, "b": made}
    return made


def _shared_key(levels):
    made = ("x",)
    for _ in range(levels):
        made = (made, made)
    return {made: 1}


def _chain(levels):
    made = {"x": 1}
    for _ in range(levels):
        made = {"a" * 100: made}
    return made


SAVED = {
    "a dict within itself": (_within_itself, "it has no tensors by name"),
    "2^26 leaves": (lambda: _shared(26), "it has no tensors by name"),
    "a key of 2^26 leaves": (lambda: _shared_key(26), "in it are `a tuple`"),
    "many keys": (lambda: dict.fromkeys(range(10**5), 1), "and 99996 more"),
    "a chain": (lambda: _chain(150), "it has no tensors by name"),
    "a long name": (lambda: {"x" * 10**6: 1}, "(1,000,000 characters)"),
    "a list": (lambda: [torch.ones(1)], "is a list"),
    "nothing": (lambda: None, "is a NoneType"),
    "a function": (lambda: {"a": print}, "holds more than tensors"),
}


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def swollen():
    """An archive of a few kilobytes that comes to 1 GB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(2**24))
    return file.getvalue()


BYTES = {
    "a swollen archive": (swollen, "larger than the file"),
    "a header beyond the file": (lambda: (2**62).to_bytes(8, "little") + b"{}", "expected a safetensors file"),
    "a header of nothing": (lambda: (2).to_bytes(8, "little") + b"{}", "tensors by name"),
    "a deep header": (lambda: (10**6).to_bytes(8, "little") + b"{" * 10**6, "cannot be read as safetensors"),
    "a pickle that calls": (lambda: b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.", "holds more than tensors"),
    "a pickle of nothing": (lambda: b"\x80\x02", "cannot be read by torch.load"),
    "an archive of nothing": (lambda: b"PK\5\6" + bytes(18), "holds more than tensors"),
    "nothing": (lambda: b"", "got 0 bytes"),
}
