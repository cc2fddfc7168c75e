"""Compiles every kernel with NVRTC for every architecture, and fails on errors, warnings and spills.

QUAYLINE_SM names architectures other than sm_80, sm_90a and sm_100a. Needs NVIDIA's run-time compiler (a library, no GPU and no driver): `libnvrtc.so` beside the package `nvidia.cuda_nvrtc`
or `nvidia.cu13`, or named by QUAYLINE_NVRTC.
"""

import ctypes
import glob
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


def instructions(cubin, names):
    """How often each of these instructions is in machine code."""
    found = [path for path in sys.path for path in glob.glob(f"{path}/nvidia/*/bin/nvdisasm")]
    if not found:
        sys.exit("no nvdisasm to look for instructions with: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([found[0], file.name], capture_output=True, text=True, check=True).stdout
    return {name: len(re.findall(rf"\b{name}\b", listing)) for name in names}


def hopper_faults(log, code):
    """What a program for Hopper lacks: products and tile copies among its machine code, and products that run together."""
    counts = instructions(code, ["HGMMA", "UTMALDG", "USETMAXREG"])
    print("  " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    faults = [f"no {name} in the machine code" for name, count in counts.items() if count == 0]
    if "serialized" in log:
        faults.append("the compiler makes products wait for each other")
    return faults


def main():
    nvrtc = library()
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


if __name__ == "__main__":
    main()
