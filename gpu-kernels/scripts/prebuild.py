"""The programs inside the crate, `gpu-kernels/prebuilt`: PTX, and machine code (cubins) for the GPUs that have it. Makes the archives
that it is given (`ptx`, `sm_80`, `sm_90a`, `sm_100`), or with `check` looks at what is there.

An archive is all programs of one kind, sealed and one after the other, as one .lzma: the code of a program's kernels for several
types is much alike, so together they take a fifth of what each by itself would. `index.txt` names its parts in their order, with
the hash of the source that each was made from (`Source::hash` of src/cuda/source.rs) and its length.
"""

import ctypes
import glob
import lzma
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from nvrtc_check import HEADERS, KERNELS, OPTIONS, compile_kernel, instructions, library, runs_on

FOLDER = KERNELS.parent / "prebuilt"
LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24, "lc": 2, "lp": 2, "pb": 4}]


def fnv(parts):
    """As `hash` of src/cuda/source.rs."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in part + len(part).to_bytes(8, "little"):
            value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def source_hash(source):
    """As `Source::hash` of src/cuda/source.rs."""
    texts = [source.read_bytes()]
    for text in texts:
        for name in HEADERS:
            header = (KERNELS / name).read_bytes()
            if f'#include "{name}"'.encode() in text and header not in texts:
                texts.append(header)
    return fnv(texts + [option.encode() for option in OPTIONS])


def seal(name, code):
    """As a file of the disk cache, src/cuda/cache.rs."""
    return b"quaycub1" + fnv([name.encode(), code]).to_bytes(8, "little") + code


def index():
    """Of each part: its archive, program, hash and length."""
    path = FOLDER / "index.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def parts(kind):
    """The code of each program in an archive."""
    whole, at, found = lzma.decompress((FOLDER / f"{kind}.lzma").read_bytes()), 0, {}
    for archive, program, _, length in index():
        if archive == kind:
            found[program] = whole[at + 16:at + int(length)]
            at += int(length)
    return found


def short(ptx):
    """Without comments and the empty lines between them: half of it."""
    lines = [line.rstrip() for line in ptx.decode().splitlines() if not line.startswith("//")]
    return ("\n".join(line for line in lines if line) + "\n").encode()


def write(kind):
    """Makes one archive and its lines of the index."""
    nvrtc = library()

    def one(source):
        target = kind
        if kind == "ptx":
            target = "compute_80" if runs_on(source, "sm_80") else "compute_90a"
        code, log = compile_kernel(nvrtc, source, [f"--gpu-architecture={target}", *OPTIONS])
        if code is None:
            sys.exit(f"{source.name} {target}: {log}")
        hashed = source_hash(source)
        return source.stem, f"{hashed:016x}", seal(f"{source.stem}-{kind}-{hashed:016x}", short(code) if kind == "ptx" else code)

    sources = [path for path in sorted(KERNELS.glob("*.cu")) if kind == "ptx" or runs_on(path, kind)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(one, sources))
    packed = lzma.compress(b"".join(sealed for _, _, sealed in made), format=lzma.FORMAT_ALONE, filters=LZMA)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{kind}.lzma").write_bytes(packed)
    lines = [part for part in index() if part[0] != kind]
    lines += [[kind, program, hashed, str(len(sealed))] for program, hashed, sealed in made]
    (FOLDER / "index.txt").write_text("".join(" ".join(line) + "\n" for line in sorted(lines)))
    print(f"{kind}: {len(made)} programs, {sum(len(sealed) for _, _, sealed in made)} bytes in {len(packed)}")


def opened(ptx):
    """As src/cuda/embedded.rs gives it to a GPU that waits for earlier launches."""
    for instruction in ["griddepcontrol.wait;", "griddepcontrol.launch_dependents;"]:
        ptx = ptx.replace(f"/*{instruction}*/", instruction)
    return ptx.replace(".target sm_80", ".target sm_90", 1)


def assemble(linker, ptx, architecture):
    """What the assembler has against a PTX; nothing where it takes it."""
    call = lambda name, *arguments: getattr(linker, f"__nvJitLink{name}_12_8")(*arguments)
    handle, text = ctypes.c_void_p(), ptx.encode() + b"\0"
    option = (ctypes.c_char_p * 1)(f"-arch={architecture}".encode())
    created = call("Create", ctypes.byref(handle), 1, option)
    assert created == 0, f"nvJitLinkCreate: {created}"
    kind_ptx = 2
    failed = call("AddData", handle, kind_ptx, text, ctypes.c_size_t(len(text)), b"ptx") or call("Complete", handle)
    size = ctypes.c_size_t()
    call("GetErrorLogSize", handle, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    call("GetErrorLog", handle, log)
    call("Destroy", ctypes.byref(handle))
    return log.value.decode() or f"error {failed}" if failed else None


def machine_fault(name, kernels, cubin):
    """What a cubin for Hopper or later lacks: each kernel waits for earlier launches and lets later ones come; and what programs
    for Hopper are made of."""
    waits, opens, *hopper = instructions(cubin, ["ACQBULK", "PREEXIT", "HGMMA", "UTMALDG", "USETMAXREG"]).values()
    if (waits, opens) != (kernels, kernels):
        return f"{waits} waits and {opens} openings in {kernels} kernels"
    if name.startswith("hopper_") and not all(hopper):
        return f"products, copies and registers of Hopper: {hopper}"
    return None


def check():
    """Whether every PTX inside the crate assembles for the GPUs that it is for, and what the machine code is made of."""
    found = [path for folder in sys.path for path in glob.glob(f"{folder}/nvidia/*/lib/libnvJitLink.so.12")]
    if not found:
        sys.exit("no nvJitLink: pip install nvidia-nvjitlink-cu12")
    linker = ctypes.CDLL(found[-1])
    texts = {name: text.decode() for name, text in parts("ptx").items()}
    jobs = [(name, "sm_80", "assembles", assemble, (linker, text, "sm_80")) for name, text in texts.items() if ".target sm_80" in text]
    for name, text in texts.items():
        architecture = "sm_90a" if ".target sm_90a" in text else "sm_90"
        jobs.append((name, architecture, "assembles", assemble, (linker, opened(text), architecture)))
    for architecture in ["sm_90a", "sm_100"]:
        for name, cubin in parts(architecture).items():
            arguments = (name, texts[name].count(".entry "), cubin)
            jobs.append((name, architecture, "is machine code", machine_fault, arguments))
    faults = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: job[3](*job[4]), jobs)
        for (name, architecture, good, _, _), fault in zip(jobs, results):
            print(f"{name} {architecture}: {fault or good}")
            faults += fault is not None
    sys.exit(faults > 0)


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        check()
    for wanted in sys.argv[1:]:
        write(wanted)
