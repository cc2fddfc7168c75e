"""The shapes of targets.tsv with FlashInfer, cuDNN (through PyTorch) and PyTorch itself, whichever are there; and one table
of these and our figures.

usage: gpu_peers.py time [ID ...]              lines "id, work, peer, microseconds", tabs between; "-" for what is absent
       gpu_peers.py table OURS PEERS [ID ...]  the table of two files of such lines; in OURS those without a peer are ours
       gpu_peers.py cublaslt                   the path of a cuBLASLt that was installed with Python's packages, if any
"""
import importlib
import site
import sys
from pathlib import Path

PEERS = ("flashinfer", "cudnn", "torch")
# Measured by gpu_bench.
LIBRARIES = ("cublaslt", "serial")
# Launches of a chain: LINKS of gpu_bench.rs.
LINKS = 64


def lengths(text):
    parts = (part.split("x") for part in text.split(","))
    return [int(length) for times, length in parts for _ in range(int(times))]


class Target:
    def __init__(self, line):
        (self.id, self.kernel, query, kv, dim, page, self.cache, queries, contexts, self.unit, floor, goal) = line.split("\t")
        self.query, self.kv, self.dim, self.page = int(query), int(kv), int(dim), int(page)
        self.queries, self.contexts = lengths(queries), lengths(contexts)
        assert len(self.queries) == len(self.contexts), self.id
        self.floor, self.goal = floor, goal
        self.causal = self.kernel != "full"

    def work(self):
        """As `work` of gpu_bench.rs: operations where the unit counts them, else bytes."""
        rows = sum(self.queries)
        if self.kernel == "linear":
            if self.unit == "TFLOP/s":
                return 2 * rows * self.dim * self.query
            return 2 * (self.dim * self.query + rows * (self.dim + self.query))
        if self.unit == "TFLOP/s":
            seen = sum(q * k - (q * (q - 1) // 2 if self.causal else 0) for q, k in zip(self.queries, self.contexts))
            return 4 * seen * self.query * self.dim
        if self.kernel in ("norm", "chain"):
            return 2 * 2 * rows * self.dim * (LINKS if self.kernel == "chain" else 1)
        if self.kernel == "sample":
            return 2 * rows * self.dim
        element = 2 if self.cache == "bf16" else 1
        return 2 * element * sum(self.contexts) * self.kv * self.dim + 2 * 2 * rows * self.query * self.dim

    def figure(self, work, microseconds):
        return microseconds if self.unit == "us" else work / microseconds / 1e6


def targets():
    lines = Path(__file__).with_name("targets.tsv").read_text().splitlines()
    return [Target(line) for line in lines if line and not line.startswith("#")]


def optional(name):
    try:
        return importlib.import_module(name)
    except Exception:  # Absent, or there without the libraries that it needs: it is no peer here either way.
        return None


class Runner:
    """Times of one peer each; None where it cannot run a shape."""

    def __init__(self):
        self.torch = optional("torch")
        if self.torch is not None and not self.torch.cuda.is_available():
            self.torch = None
        self.flashinfer = optional("flashinfer") if self.torch else None

    def microseconds(self, run):
        torch = self.torch
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            again = graph.replay
        except Exception:  # Not every library can be recorded.
            again = run
        best = float("inf")
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(20):
                again()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) * 1e3 / 20)
        return best

    def random(self, *shape):
        return self.torch.randn(*shape, device="cuda", dtype=self.torch.bfloat16)

    def run(self, peer, target):
        if self.torch is None or (peer == "flashinfer" and self.flashinfer is None):
            return None
        if target.kernel in ("norm", "chain", "sample", "linear"):
            return getattr(self, f"{peer}_{target.kernel}")(target)
        return getattr(self, f"{peer}_attention")(target)

    def flashinfer_attention(self, t):
        torch, fi = self.torch, self.flashinfer
        pages = [-(-k // t.page) for k in t.contexts]
        total = sum(pages)
        cache = self.random(total, 2, t.page, t.kv, t.dim)
        if t.cache != "bf16":
            cache = cache.to(torch.float8_e4m3fn)
        cumulative = lambda xs: torch.tensor([0] + xs, dtype=torch.int32).cumsum(0).to("cuda", torch.int32)
        indices = torch.randperm(total, device="cuda").to(torch.int32)
        last = torch.tensor([(k - 1) % t.page + 1 for k in t.contexts], dtype=torch.int32, device="cuda")
        q = self.random(sum(t.queries), t.query, t.dim)
        space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        if t.kernel == "decode":
            wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
            wrapper.plan(cumulative(pages), indices, last, t.query, t.kv, t.dim, t.page,
                         q_data_type=q.dtype, kv_data_type=cache.dtype)
        else:
            wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(
                space, "NHD", backend="fa2" if t.kernel == "prefill" else "auto")
            wrapper.plan(cumulative(t.queries), cumulative(pages), indices, last, t.query, t.kv, t.dim, t.page,
                         causal=t.causal, q_data_type=q.dtype, kv_data_type=cache.dtype)
        return self.microseconds(lambda: wrapper.run(q, cache))

    def sdpa(self, t, backend):
        """Without pages, and for requests of one length alone."""
        torch, functional = self.torch, self.torch.nn.functional
        if len(set(t.queries)) > 1 or len(set(t.contexts)) > 1 or t.cache != "bf16":
            return None
        (queries, context), batch = (t.queries[0], t.contexts[0]), len(t.queries)
        q = self.random(batch, t.query, queries, t.dim)
        k, v = (self.random(batch, t.kv, context, t.dim) for _ in range(2))
        causal = t.causal and queries == context
        if t.causal and 1 < queries < context:
            return None
        from torch.nn.attention import sdpa_kernel
        with sdpa_kernel(backend):
            return self.microseconds(
                lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))

    def cudnn_attention(self, t):
        return self.sdpa(t, self.torch.nn.attention.SDPBackend.CUDNN_ATTENTION)

    def torch_attention(self, t):
        return self.sdpa(t, self.torch.nn.attention.SDPBackend.FLASH_ATTENTION)

    def torch_norm(self, t):
        x, weight = self.random(sum(t.queries), t.dim), self.random(t.dim)
        return self.microseconds(lambda: self.torch.nn.functional.rms_norm(x, (t.dim,), weight, 1e-5))

    def flashinfer_norm(self, t):
        x, weight = self.random(sum(t.queries), t.dim), self.random(t.dim)
        return self.microseconds(lambda: self.flashinfer.norm.rmsnorm(x, weight, 1e-5))

    def flashinfer_sample(self, t):
        fi = self.flashinfer
        logits = self.random(sum(t.queries), t.dim).float()
        return self.microseconds(lambda: fi.sampling.top_k_top_p_sampling_from_logits(logits / 0.8, 50, 0.9))

    def torch_chain(self, t):
        x, weight = self.random(sum(t.queries), t.dim), self.random(t.dim)

        def chain(y):
            for _ in range(LINKS):
                y = self.torch.nn.functional.rms_norm(y, (t.dim,), weight, 1e-5)
            return y

        return self.microseconds(lambda: chain(x))

    def cudnn_norm(self, t):
        return None

    cudnn_chain = flashinfer_chain = cudnn_sample = torch_sample = cudnn_linear = flashinfer_linear = cudnn_norm

    def torch_linear(self, t):
        x, weight = self.random(sum(t.queries), t.dim), self.random(t.query, t.dim)
        return self.microseconds(lambda: self.torch.nn.functional.linear(x, weight))

    def ceilings(self):
        """What this machine copies and multiplies."""
        if self.torch is None:
            return
        torch = self.torch
        x = self.random(1 << 28)
        y = torch.empty_like(x)
        yield "copy", 4 * x.numel(), self.microseconds(lambda: y.copy_(x))
        a, b = self.random(8192, 8192), self.random(8192, 8192)
        yield "gemm", 2 * 8192**3, self.microseconds(lambda: torch.mm(a, b))


def time(ids):
    runner = Runner()
    for name, work, microseconds in runner.ceilings():
        print(f"{name}\t{work}\ttorch\t{microseconds:.2f}", flush=True)
    for target in targets():
        if ids and target.id not in ids:
            continue
        for peer in PEERS:
            try:
                found = runner.run(peer, target)
            except Exception as error:  # One peer that fails on one shape must not lose the table.
                print(f"{target.id}: {peer}: {error}", file=sys.stderr)
                found = None
            print(f"{target.id}\t{target.work()}\t{peer}\t{'-' if found is None else f'{found:.2f}'}", flush=True)


def lines(path):
    return [line.split() for line in Path(path).read_text().splitlines()]


def table(ours, peers, ids):
    mine, theirs = {}, {}
    for name, work, *peer, found in lines(ours) + lines(peers):
        if peer:
            theirs[name, peer[0]] = (int(work), found)
        else:
            mine[name] = (int(work), found)
    ceiling = {}
    for name, unit in (("copy", "TB/s"), ("gemm", "TFLOP/s")):
        if (name, "torch") in theirs:
            work, found = theirs[name, "torch"]
            ceiling[unit] = work / float(found) / 1e6
            print(f"{name} on this machine: {ceiling[unit]:.2f} {unit}\n")
    columns = PEERS + LIBRARIES
    print("| id | unit | floor | goal | ours | share | " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|---|" + "---|" * len(columns))
    for t in targets():
        if ids and t.id not in ids:
            continue
        work, found = mine.get(t.id, (t.work(), "-"))
        assert work == t.work(), f"{t.id}: {work} by us, {t.work()} by the peers"
        figure = None if found == "-" else t.figure(work, float(found))
        share = "" if figure is None or t.unit not in ceiling else f"{100 * figure / ceiling[t.unit]:.0f} %"
        cells = []
        for peer in columns:
            peer_work, peer_found = theirs.get((t.id, peer), (work, None))
            assert peer_work == work, f"{t.id}: {peer_work} by {peer}, {work} by us"
            absent = "" if peer_found is None else "peer absent"
            cells.append(absent if peer_found in (None, "-") else f"{t.figure(work, float(peer_found)):.4g}")
        shown = "not run" if figure is None else f"{figure:.4g}"
        print(f"| {t.id} | {t.unit} | {t.floor} | {t.goal} | {shown} | {share} | " + " | ".join(cells) + " |")


def cublaslt():
    """PyTorch brings one."""
    folders = [Path(folder) for folder in site.getsitepackages() + sys.path if folder]
    found = (path for folder in folders for path in sorted(folder.glob("nvidia/*/lib/libcublasLt.so.*")))
    print(next(found, ""))


if __name__ == "__main__":
    if sys.argv[1:2] == ["time"]:
        time(sys.argv[2:])
    elif sys.argv[1:2] == ["table"] and len(sys.argv) >= 4:
        table(*sys.argv[2:4], sys.argv[4:])
    elif sys.argv[1:] == ["cublaslt"]:
        cublaslt()
    else:
        sys.exit(__doc__)
