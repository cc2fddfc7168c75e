"""Compiles every kernel with NVRTC for every architecture, and fails on errors, spills and stacks.

Needs NVIDIA's run-time compiler (a library, no GPU and no driver): `libnvrtc.so` beside the package `nvidia.cuda_nvrtc`
or `nvidia.cu13`, or named by QUAYLINE_NVRTC.
"""

import ctypes
import glob
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
HEADERS = ["prelude.cuh", "device.cuh", "softmax.cuh", "attention.cuh"]
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]
# As src/cuda/source.rs: what is checked is what is run.
OPTIONS = ["--std=c++17", "--fmad=false", "--ptxas-options=-v"]


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


def compile_kernel(nvrtc, source, architecture):
    """The size of the cubin in bytes (None when it does not compile), and what the compilers said."""
    program = ctypes.c_void_p()
    texts = [(KERNELS / name).read_bytes() for name in HEADERS]
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(HEADERS),
        (ctypes.c_char_p * len(HEADERS))(*texts),
        (ctypes.c_char_p * len(HEADERS))(*(name.encode() for name in HEADERS)),
    )
    assert created == 0, f"nvrtcCreateProgram: {created}"
    options = [option.encode() for option in [f"--gpu-architecture={architecture}", *OPTIONS]]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if not failed:
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return None if failed else size.value, log.value.decode()


def figures(log):
    """Of each kernel: its name, registers, bytes of stack, bytes spilled (stores and loads)."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers", re.S)
    return [
        (name, int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in pattern.findall(log)
    ]


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
            return job, compile_kernel(nvrtc, *job), time.monotonic() - start
        for (source, architecture), (size, log), seconds in pool.map(
            one, [(source, architecture) for source in sources for architecture in ARCHITECTURES]
        ):
            if size is None:
                print(f"{source.name} {architecture}: does not compile\n{log}")
                faults += 1
                continue
            kernels = figures(log)
            named = set(re.findall(r"^(?:KERNEL|[A-Z_]+KERNEL)\((\w+)", source.read_text(), re.M))
            print(f"{source.name} {architecture}: {len(kernels)} kernels, {size} bytes, {seconds:.1f} s")
            if not kernels:
                print(f"  no kernel in the log of {sorted(named)}:\n{log}")
                faults += 1
            for name, registers, stack, spilled in kernels:
                fault = stack > 0 or spilled > 0
                print(f"  {name}: {registers} registers" + (f", {stack} bytes of stack, {spilled} spilled" if fault else ""))
                faults += fault
            for warning in re.findall(r"^.*\bwarning\b.*$", log, re.M):
                print(f"  {warning}")
                faults += 1
    print("all kernels compile without spills" if faults == 0 else f"{faults} faults")
    sys.exit(faults > 0)


main()
