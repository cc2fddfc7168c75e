"""Compiles every kernel with NVRTC for every architecture, and fails on errors, warnings and spills. With --ptx it writes
the PTX that the crate carries instead, for sm_80 and later; with --prebuilt it assembles that PTX, as drivers do.

QUAYLINE_SM names architectures other than sm_80, sm_90a and sm_100a. Needs NVIDIA's run-time compiler (a library, no GPU and no driver): `libnvrtc.so` beside the package `nvidia.cuda_nvrtc`
or `nvidia.cu13`, or named by QUAYLINE_NVRTC.
"""

import ctypes
import glob
import gzip
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
HEADERS = sorted(path.name for path in KERNELS.glob("*.cuh"))
ARCHITECTURES = os.environ.get("QUAYLINE_SM", "sm_80 sm_90a sm_100a").split()
# As src/cuda/source.rs: what is checked is what is run.
OPTIONS = ["--std=c++17", "--fmad=false"]


def runs_on(source, architecture):
    """Programs named after Hopper are for it alone."""
    return not source.name.startswith("hopper_") or architecture == "sm_90a"


def library():
    """The newest NVRTC at hand, its helper loaded first: some wheels do not find it by themselves."""
    named = os.environ.get("QUAYLINE_NVRTC")
    folders = [Path(path) / "nvidia" for path in sys.path if path]
    found = [named] if named else sorted(
        path for folder in folders for path in glob.glob(f"{folder}/*/lib/libnvrtc.so.*")
    )
    if not found:
        sys.exit("no NVRTC: pip install nvidia-cuda-nvrtc-cu12")
    path = Path(found[-1])
    for helper in glob.glob(f"{path.parent}/libnvrtc-builtins.so.*"):
        ctypes.CDLL(helper, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def compile_kernel(nvrtc, source, options):
    """The compiled program (None when it does not compile), and what the compilers said."""
    program = ctypes.c_void_p()
    texts = [(KERNELS / name).read_bytes() for name in HEADERS]
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(HEADERS),
        (ctypes.c_char_p * len(HEADERS))(*texts),
        (ctypes.c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS)),
    )
    assert created == 0, f"nvrtcCreateProgram: {created}"
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    code = None
    if not failed:
        kind = "CUBIN" if any("=sm_" in option for option in options) else "PTX"
        getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{kind}")(program, code)
        code = code.raw.rstrip(b"\0") if kind == "PTX" else code.raw
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log.value.decode()


def figures(log):
    """Of each kernel: its name, registers, bytes of stack, bytes spilled (stores and loads)."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers", re.S)
    return [
        (name, int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in pattern.findall(log)
    ]


# What a thread of a Hopper program starts with. Its three warp groups give back and take registers up to three times as many;
# who asks for more than is left waits forever.
HOPPER_REGISTERS = 168


def machine_faults(name, kernels, log, code):
    """What is wrong with assembled kernels: spills, and for Hopper the number of registers or instructions."""
    faults = [f"{kernel}: {spilled} bytes spilled" for kernel, _, _, spilled in kernels if spilled]
    if not name.startswith("hopper_"):
        return faults
    faults += [
        f"{kernel}: {registers} registers, not {HOPPER_REGISTERS}"
        for kernel, registers, _, _ in kernels if registers != HOPPER_REGISTERS
    ]
    return faults + hopper_faults(log, code)


def hopper_faults(log, code):
    """What a program for Hopper lacks: products and tile copies among its machine code, and products that run together."""
    found = [path for path in sys.path for path in glob.glob(f"{path}/nvidia/*/bin/nvdisasm")]
    if not found:
        return ["no nvdisasm to look for HGMMA with: pip install nvidia-cuda-nvdisasm"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        listing = subprocess.run([found[0], file.name], capture_output=True, text=True, check=True).stdout
    counts = {name: len(re.findall(rf"\b{name}\b", listing)) for name in ["HGMMA", "UTMALDG", "USETMAXREG"]}
    print("  " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    faults = [f"no {name} in the machine code" for name, count in counts.items() if count == 0]
    if "serialized" in log:
        faults.append("the compiler makes products wait for each other")
    return faults


def source_hash(source):
    """As `Source::hash` of src/cuda/source.rs."""
    value = 0xCBF29CE484222325
    texts = [source.read_bytes()]
    for text in texts:
        for name in HEADERS:
            header = (KERNELS / name).read_bytes()
            if f'#include "{name}"'.encode() in text and header not in texts:
                texts.append(header)
    for part in texts + [option.encode() for option in OPTIONS]:
        for byte in part + len(part).to_bytes(8, "little"):
            value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def prebuild(nvrtc):
    """Writes the PTX of every program, compressed, and the hashes of their sources."""
    folder = KERNELS.parent / "prebuilt"
    folder.mkdir(exist_ok=True)
    hashes = []
    known = (folder / "hashes.txt").read_text().splitlines() if (folder / "hashes.txt").exists() else []
    for source in sorted(KERNELS.glob("*.cu")):
        line = f"{source.stem} {source_hash(source):016x}"
        hashes.append(line)
        if line in known and (folder / f"{source.stem}.ptx.gz").exists():
            continue
        ptx, log = compile_kernel(nvrtc, source, [f"--gpu-architecture={'compute_80' if runs_on(source, 'sm_80') else 'compute_90a'}", *OPTIONS])
        if ptx is None:
            sys.exit(f"{source.name}: {log}")
        # Comments and the empty lines between them are half of it.
        lines = [line.rstrip() for line in ptx.decode().splitlines() if not line.startswith("//")]
        text = "\n".join(line for line in lines if line) + "\n"
        packed = gzip.compress(text.encode(), mtime=0)
        (folder / f"{source.stem}.ptx.gz").write_bytes(packed)
        print(f"{source.stem}: {len(packed)} bytes")
    (folder / "hashes.txt").write_text("\n".join(hashes) + "\n")


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


def check_prebuilt():
    """Whether every PTX inside the crate assembles for the GPUs that it is for."""
    found = [path for folder in sys.path for path in glob.glob(f"{folder}/nvidia/*/lib/libnvJitLink.so.12")]
    if not found:
        sys.exit("no nvJitLink: pip install nvidia-nvjitlink-cu12")
    linker = ctypes.CDLL(found[-1])
    files = sorted((KERNELS.parent / "prebuilt").glob("*.ptx.gz"))
    texts = {file.name.removesuffix(".ptx.gz"): gzip.decompress(file.read_bytes()).decode() for file in files}
    jobs = [(name, text, "sm_80") for name, text in texts.items() if ".target sm_80" in text]
    jobs += [(name, opened(text), "sm_90a" if ".target sm_90a" in text else "sm_90") for name, text in texts.items()]
    faults = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (name, _, architecture), fault in zip(jobs, pool.map(lambda job: assemble(linker, *job[1:]), jobs)):
            print(f"{name} {architecture}: {fault or 'assembles'}")
            faults += fault is not None
    sys.exit(faults > 0)


def main():
    if sys.argv[1:] == ["--prebuilt"]:
        check_prebuilt()
    nvrtc = library()
    if sys.argv[1:] == ["--ptx"]:
        return prebuild(nvrtc)
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    print(f"NVRTC {major.value}.{minor.value}")
    wanted = sys.argv[1:]
    sources = sorted(path for path in KERNELS.glob("*.cu") if not wanted or path.stem in wanted)
    faults = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        def one(job):
            start = time.monotonic()
            source, architecture = job
            options = [f"--gpu-architecture={architecture}", *OPTIONS, "--ptxas-options=-v"]
            return job, compile_kernel(nvrtc, source, options), time.monotonic() - start
        for (source, architecture), (code, log), seconds in pool.map(
            one, [(source, architecture) for source in sources for architecture in ARCHITECTURES if runs_on(source, architecture)]
        ):
            if code is None:
                print(f"{source.name} {architecture}: does not compile\n{log}")
                faults += 1
                continue
            kernels = figures(log)
            print(f"{source.name} {architecture}: {len(kernels)} kernels, {len(code)} bytes, {seconds:.1f} s")
            if not kernels:
                print(f"  no kernel in what ptxas said:\n{log}")
                faults += 1
            for name, registers, stack, spilled in kernels:
                print(f"  {name}: {registers} registers" + (f", {stack} bytes of stack, {spilled} spilled" if stack else ""))
            for fault in machine_faults(source.stem, kernels, log, code):
                print(f"  {fault}")
                faults += 1
            for warning in re.findall(r"^.*\bwarning\b.*$", log, re.M):
                print(f"  {warning}")
                faults += 1
    print("all kernels compile without spills" if faults == 0 else f"{faults} faults")
    sys.exit(faults > 0)


main()
