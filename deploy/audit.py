"""Hold a wheel to what docs/wheels.md promises of it."""

from __future__ import annotations

import email
import fnmatch
import hashlib
import json
import os
import re
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from packaging.tags import parse_tag
from packaging.utils import parse_wheel_filename

from benchmarks.estimates.sass import disassembler
from deploy.archive import Built, digest, extensions, metadata, unpack
from deploy.commands import ROOT, run
from deploy.repair import EXCLUDED, platforms

MEGABYTES = 25


@dataclass
class Audit:
    """What was seen in a wheel, line by line, and what is wrong with it."""

    seen: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def hold(self, good: bool, line: str, fault: str = "") -> None:
        self.seen.append(line)
        if not good:
            self.faults.append(fault or line)


def _record(files: dict[str, bytes], audit: Audit) -> None:
    (record,) = (n for n in files if n.endswith(".dist-info/RECORD"))
    rows = dict(line.split(",", 1) for line in files[record].decode().splitlines())
    wrong = [n for n, data in files.items() if n != record and rows.get(n) != f"sha256={digest(data)},{len(data)}"]
    audit.hold(
        not wrong and set(rows) == set(files), f"RECORD: {len(rows)} files", f"RECORD is wrong about {wrong[:3]}"
    )


def _names(name: str, files: dict[str, bytes], audit: Audit) -> None:
    """What the file's name says, against what is in it: an installer believes the one or the other."""
    _, version, _, tags = parse_wheel_filename(name)
    (inside,) = (data for n, data in files.items() if n.endswith(".dist-info/WHEEL"))
    stated = {tag for line in email.message_from_bytes(inside).get_all("Tag", []) for tag in parse_tag(line)}
    line = f"tags: {', '.join(sorted(map(str, tags)))}"
    audit.hold(stated == tags, line, "the file WHEEL has other tags than the name")
    told = {"METADATA": metadata(files)["Version"], "_built.json": built_as(files)}
    other = [f"{where} {what}" for where, what in told.items() if what != str(version)]
    audit.hold(not other, f"version: {version}", f"the name says version {version}, others: {', '.join(other)}")


def built_as(files: dict[str, bytes]) -> str | None:
    """The version that the package will say it is."""
    return json.loads(files.get("spectral_ops/_built.json", b"{}")).get("version")


def _contents(files: dict[str, bytes], audit: Audit) -> None:
    strange = [n for n in files if not re.search(r"\.(py|json|abi3\.so)$|\.dist-info/", n)]
    audit.hold(not strange, "contents: Python, JSON and extensions", f"holds also {strange[:3]}")
    (info,) = {n.split("/")[0] for n in files if n.split("/")[0].endswith(".dist-info")}
    tops = {n.split("/")[0] for n in files} - {info}
    audit.hold(tops == {"spectral_ops"}, f"top level: {', '.join(sorted(tops))}")
    for name in ("licenses/LICENSE", "licenses/NOTICE", "sboms/spectral_ops.cdx.json"):
        there = f"{info}/{name}" in files or f"{info}/{Path(name).name}" in files  # setuptools < 77 has no folder
        audit.hold(there, f"{name}: {'there' if there else 'missing'}")
    bom = json.loads(files.get(f"{info}/sboms/spectral_ops.cdx.json", b"{}"))
    for part in bom.get("components", []):
        if part["type"] == "file":
            good = part["hashes"][0]["content"] == hashlib.sha256(files[part["name"]]).hexdigest()
            audit.hold(good, f"bill of materials: {part['name']}", f"bill of materials has another {part['name']}")


def _library(name: str, path: Path, one: Built, audit: Audit) -> None:
    readelf = lambda *options: run("readelf", "-W", *options, path)  # noqa: E731
    data = path.read_bytes()
    dynamic, segments, sections, symbols = readelf("-d"), readelf("-l"), readelf("-S"), readelf("--dyn-syms")
    short = Path(name).name
    audit.seen.append(f"{short}: {len(data) / 1e6:.1f} MB, {one.text}")
    needed = sorted(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    audit.hold(not any("python" in n or "cudart" in n for n in needed), f"{short}: needs {', '.join(needed)}")
    audit.hold(not re.search(r"RPATH|RUNPATH", dynamic), f"{short}: no run path", f"{short}: has a run path")
    hard = {
        "BIND_NOW": bool(re.search(r"BIND_NOW|FLAGS_1.*NOW", dynamic)),
        "RELRO": "GNU_RELRO" in segments,
        "stack not executable": bool(re.search(r"GNU_STACK\s+\S+ \S+ \S+ \S+ \S+ RW ", segments)),
        "no segment writable and executable": not re.search(r"LOAD\s.*RWE", segments),
        "stack protector": "__stack_chk_fail" in symbols,
        "no text relocations": "TEXTREL" not in dynamic,
    }
    for what, there in hard.items():
        audit.hold(there, f"{short}: {what}", f"{short}: not so: {what}")
    audit.hold(
        ".symtab" not in sections and ".debug_info" not in sections, f"{short}: stripped", f"{short}: has symbols"
    )
    exported = {line.split()[-1] for line in symbols.splitlines() if re.search(r"(GLOBAL|WEAK) +DEFAULT +\d+ ", line)}
    audit.hold(exported == {f"PyInit_{short.split('.')[0]}"}, f"{short}: exports {', '.join(sorted(exported)[:5])}")
    places = {os.fsencode(p) for p in (ROOT, Path.home(), sys.prefix, sys.base_prefix, tempfile.gettempdir())} - {b"/"}
    places |= {os.fsencode(Path(sysconfig.get_path("purelib")))}
    found = {p.decode() for p in places if p + b"/" in data}
    found |= {
        p.decode() for p in re.findall(rb"/(?:home|root|Users|build|builds|io|project|src|workspace)/[\w.+-]+", data)
    }
    audit.hold(
        not found, f"{short}: names no place on the build machine", f"{short}: names {', '.join(sorted(found)[:5])}"
    )


def _images(path: Path, one: Built, audit: Audit) -> None:
    """The GPU code: an image for each architecture, compressed."""
    fat = re.findall(rb"\x50\xed\x55\xba", path.read_bytes())
    audit.hold(bool(fat), f"{len(fat)} fat binaries", "no GPU code")
    cuobjdump = disassembler()
    if cuobjdump is None:
        audit.seen.append("GPU code: not looked into (cuobjdump was not found)")
        return
    images = re.findall(r"ELF file +\d+: \S+\.sm_(\d+)[af]?\.cubin", run(cuobjdump, "-lelf", path))
    ptx = re.findall(r"PTX file +\d+: \S+\.sm_(\d+)[af]?\.ptx", run(cuobjdump, "-lptx", path))
    plain = {re.sub(r"\D", "", arch) for arch in one.archs}
    audit.hold(set(images) == plain, f"GPU code: {len(images)} images for sm_{', sm_'.join(sorted(set(images)))}")
    wanted = {re.sub(r"\D", "", arch) for arch in one.archs if arch.endswith("+PTX")}
    audit.hold(set(ptx) == wanted, f"PTX for newer ones: {', '.join(sorted(set(ptx))) or 'none'}")
    if one.cuda.split(".")[0] == "13":
        size = len(run_bytes("objcopy", "-O", "binary", "--only-section=.nv_fatbin", path))
        with tempfile.TemporaryDirectory() as made:
            run(cuobjdump, "-xelf", "all", path, cwd=Path(made))
            whole = sum(file.stat().st_size for file in Path(made).iterdir())
        audit.hold(size < whole / 2, f"GPU code compressed: {size / 1e6:.1f} MB of {whole / 1e6:.1f}", "not compressed")


def run_bytes(program: str, *arguments) -> bytes:
    """What objcopy makes of a file."""
    with tempfile.NamedTemporaryFile() as out:
        run(program, *arguments, out.name)
        return Path(out.name).read_bytes()


def audit(wheel: Path) -> Audit:
    """Hold one wheel to docs/wheels.md; everything seen, and every fault."""
    files, result = unpack(wheel), Audit()
    parts, fields = extensions(files), metadata(files)
    size = wheel.stat().st_size / 1e6
    result.hold(size <= MEGABYTES, f"{wheel.name}: {size:.1f} MB, at most {MEGABYTES} wanted")
    _record(files, result)
    _names(wheel.name, files, result)
    _contents(files, result)
    for line in fields.get_all("Supported-Platform", []):
        result.seen.append(f"metadata: {line}")
    needs = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    result.hold(
        all(n.startswith("torch>=") for n in needs), f"needs {', '.join(needs)}", f"needs more than torch: {needs}"
    )
    if not parts:
        result.hold(wheel.name.endswith("-py3-none-any.whl"), "pure Python")
        return result
    stated = fields.get_all("Supported-Platform", [])
    result.hold(stated == platforms(parts, wheel.name), "metadata agrees with the extensions")
    result.hold("-cp310-abi3-manylinux_" in wheel.name, f"tag: {wheel.name.split('-', 2)[2].removesuffix('.whl')}")
    shown = json.loads(run(sys.executable, "-m", "auditwheel", "show", "--json", wheel))
    outside = sorted(shown["external_libs"])
    strangers = [name for name in outside if not any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDED)]
    result.hold(not strangers, f"libraries from outside: {', '.join(outside)}", f"needs {', '.join(strangers)}")
    claimed, real = (re.search(r"manylinux_(\d+)_(\d+)", tag) for tag in (wheel.name, shown["sym_tag"]))
    good = claimed and real and tuple(map(int, claimed.groups())) >= tuple(map(int, real.groups()))
    result.hold(bool(good), f"auditwheel: its symbols would allow {shown['sym_tag']}")
    report = json.loads(run(sys.executable, "-m", "abi3audit", "--strict", "--report", wheel))
    (spec,) = report["specs"].values()
    bad = [e["name"] for e in spec["wheel"] if not e["result"]["is_abi3"] or e["result"]["non_abi3_symbols"]]
    result.hold(len(spec["wheel"]) == len(parts) and not bad, f"abi3audit: {len(spec['wheel'])} extensions of cp310")
    with tempfile.TemporaryDirectory() as made:
        for name, one in parts.items():
            path = Path(made) / Path(name).name
            path.write_bytes(files[name])
            _library(name, path, one, result)
            if one.cuda:
                _images(path, one, result)
    return result
