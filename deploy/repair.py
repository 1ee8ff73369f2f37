"""Give a wheel its manylinux tag, its bill of materials, and in its metadata what it was built for."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import tempfile
import time
import uuid
from pathlib import Path

from deploy.archive import Built, epoch, extensions, metadata, pack, unpack
from deploy.commands import Refused, run

GLIBC = "2_28"
# torch has loaded the first, the driver brings the second: neither belongs into a wheel
EXCLUDED = ("libtorch*.so*", "libc10*.so*", "libcuda.so.1")
CUDA_LICENCE = "https://docs.nvidia.com/cuda/eula/index.html"


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
