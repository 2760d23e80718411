"""The Triton kernels against float64: under Triton's interpreter on any machine, for real on a GPU, and compiled for Hopper without one.

The interpreter is chosen when triton is first imported, so `test_under_the_interpreter` runs this file once more, in a process of its own."""
import ctypes, json, math, mmap, os, re, subprocess, sys
import pytest, torch
from sparsemax_sae.ops import triton as library
from sparsemax_sae.ops.triton import (above, above_reference, available, group_maxima, group_maxima_reference, sdd, sdd_reference, spmm, spmm_pair,
    spmm_pair_reference, spmm_reference)

inf, nan = math.inf, math.nan
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(library.triton is None, reason="needs triton")
outside = pytest.mark.skipif(INTERPRETED, reason="not a matter of the interpreter")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 7), (1, 70, 16), (17, 1, 7), (5, 100, 40), (16, 64, 16), (19, 129, 33), (3, 200, 130)]      # N, M, d
floats = pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: str(t)[6:])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request): return request.param


def fence(x):
    "`x`, in memory that ends where the next page may not be touched: reading past the end crashes. On a GPU, between margins of NaN."
    n = x.numel()*x.element_size()
    if not n: return x
    if x.is_cuda:
        buffer = torch.full((x.numel() + 128,), nan if x.is_floating_point() else 0, dtype=x.dtype, device=x.device)
        return buffer[64:-64].copy_(x.flatten()).view(x.shape)
    page, whole = mmap.PAGESIZE, -(-n//mmap.PAGESIZE)*mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + page)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + whole), page, 0) == 0
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=whole - n).copy_(x.flatten()).view(x.shape)


@pytest.fixture
def guard(monkeypatch):
    "Every `torch.empty` begins poisoned; margins around it, and the end of every `torch.zeros`, must not be touched."
    made, empty, zeros = [], torch.empty, torch.zeros
    def poisoned(*shape, dtype=None, device=None, **kw):
        if kw or dtype is None: return empty(*shape, dtype=dtype, device=device, **kw)
        shape = tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape
        made.append(torch.full((math.prod(shape) + 128,), nan if dtype.is_floating_point else -77, dtype=dtype, device=device))
        return made[-1][64:-64].view(shape)
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kw: fence(zeros(*args, **kw)))
    yield
    assert made
    for buffer in made:
        margin = torch.cat([buffer[:64], buffer[-64:]])
        assert (margin.isnan() if margin.is_floating_point() else margin == -77).all(), "written out of bounds"


def rand(*shape, seed=0, dtype=torch.float32, device="cpu", whole=False):
    "Fenced random numbers; small whole ones, whose products are exact in any precision, if `whole`."
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, shape, generator=g).float() if whole else torch.randn(*shape, generator=g)
    return fence(x.to(device, dtype))

def pattern(counts, M, seed=0, device="cpu", dtype=torch.int64):
    counts = torch.tensor(counts)
    indices = torch.randint(0, M, (int(counts.sum()),), generator=torch.Generator().manual_seed(seed))
    return fence(indices.to(device, dtype)), fence(torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device))

def close(a, b, dtype=torch.float32, scale=1.):
    eps = {torch.float32: 2e-6, torch.bfloat16: 2.**-7, torch.float16: 2.**-10}[dtype]
    torch.testing.assert_close(a.double(), b.double(), atol=max(eps, 2e-6)*scale, rtol=eps)

def wide(*tensors): return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors]

def rows_of(counts, columns, values, capacity):
    "Each row's entries as a dict {column: value}."
    out = []
    for n, c, v in zip(counts.tolist(), columns.tolist(), values.tolist()):
        out.append(dict(list(zip(c, v))[:min(n, capacity)]))
        assert len(out[-1]) == min(n, capacity), "a column twice"
    return out

def entries(q, K, bias, bound, capacity=None):
    "What `above` finds, as `rows_of`, with room for all columns unless `capacity` says otherwise."
    capacity = len(K) if capacity is None else capacity
    return rows_of(*above(q, K, bias, bound, capacity), capacity)


# ---- group maxima ----
@floats
@shapes
def test_group_maxima(shape, dtype, device, guard):
    N, M, d = shape
    q, K, bias = rand(N, d, dtype=dtype, device=device), rand(M, d, seed=1, dtype=dtype, device=device), rand(M, seed=2, device=device)
    for group, b in ((16, bias), (4, None)):
        out = group_maxima(q, K, b, group)
        assert out.dtype == torch.float32 and out.shape == (N, -(-M//group))
        close(out, group_maxima_reference(*wide(q, K, b), group), scale=30)

@pytest.mark.parametrize("group", [1, 2, 8, 32, 64])
def test_any_group(group, device, guard):
    q, K = rand(3, 9, device=device), rand(70, 9, seed=1, device=device)
    close(group_maxima(q, K, group=group), group_maxima_reference(*wide(q, K), group=group), scale=30)

def test_group_maxima_of_special_values(device, guard):
    q, K, bias = rand(2, 8, device=device), rand(64, 8, seed=1, device=device), torch.zeros(64, device=device)
    K[3], bias[16:32], bias[40] = nan, -inf, inf
    heads = group_maxima(q, K, bias)
    assert heads[:, 0].isnan().all() and (heads[:, 1] == -inf).all() and (heads[:, 2] == inf).all() and heads[:, 3].isfinite().all()

@pytest.mark.parametrize("f", [lambda q, K, b: group_maxima(q, K, b), lambda q, K, b: entries(q, K, b, torch.full((len(q),), 2.5, device=q.device))], ids=["group_maxima", "above"])
def test_strides(f, device):
    q, K, bias = (rand(*s, seed=i, device=device, whole=True) for i, s in enumerate(((20, 37), (83, 37), (83,))))
    expected = f(q, K, bias)
    inside = torch.full((40, 50), nan, device=device); inside[::2, 3:40] = q
    every_other = torch.full((166,), nan, device=device); every_other[::2] = bias
    same = lambda out: torch.equal(out, expected) if isinstance(out, torch.Tensor) else out == expected
    assert same(f(inside[::2, 3:40], K.T.contiguous().T, every_other[::2]))
    assert same(f(q.T.contiguous().T, K.flip(0).contiguous().flip(0), bias))

@pytest.mark.parametrize("N,M,d", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_empty_scores(N, M, d, device):
    q, K, bound = rand(N, d, device=device), rand(M, d, device=device), torch.full((N,), -1., device=device)
    assert torch.equal(group_maxima(q, K), torch.zeros(N, -(-M//16), device=device))
    for cap in (0, 4):
        counts, columns, values = above(q, K, None, bound, cap)
        assert counts.tolist() == [M]*N and rows_of(counts, columns, values, cap) == rows_of(*above_reference(q, K, None, bound, cap), cap)


# ---- entries above a bound ----
@floats
@shapes
def test_above_with_ties(shape, dtype, device, guard):
    N, M, d = shape
    q, K, bias = (rand(*s, seed=i, dtype=t, device=device, whole=True) for i, (s, t) in enumerate((((N, d), dtype), ((M, d), dtype), ((M,), torch.float32))))
    for b in (bias, None):
        bound = fence((q.float() @ K.float().T + (0 if b is None else b)).topk(min(M, 5)).values[:, -1])    # a score itself, often many times
        counts, columns, values = above(q, K, b, bound, M)
        assert counts.dtype == columns.dtype == torch.int32 and values.dtype == torch.float32 and columns.shape == values.shape == (N, M)
        expected = above_reference(*wide(q, K, b, bound), M)
        assert torch.equal(counts, expected[0]) and (counts >= min(M, 5)).all()
        assert rows_of(counts, columns, values, M) == rows_of(*expected, M)

@pytest.mark.parametrize("capacity", [129, 1000])
def test_above_for_any_bound(capacity, device, guard):
    q, K, bias = (rand(*s, seed=i, device=device, whole=True) for i, s in enumerate(((19, 33), (129, 33), (129,))))
    for bound in (torch.full((19,), -inf), torch.full((19,), inf), torch.full((19,), 30.), torch.linspace(-200, 200, 19)):
        assert entries(q, K, bias, bound.to(device), capacity) == rows_of(*above_reference(q, K, bias, bound.to(device), 129), 129)

def test_overflow_is_counted_and_not_written(device, guard):
    q, K = rand(19, 9, device=device, whole=True), rand(150, 9, seed=1, device=device, whole=True)
    bound = torch.where(torch.arange(19, device=device) % 2 == 0, 0., inf)
    full = rows_of(*above(q, K, None, bound, 150), 150)
    for capacity in (0, 1, 3, 40):
        counts, columns, values = above(q, K, None, bound, capacity)
        assert counts.tolist() == [len(r) for r in full]
        for some, every in zip(rows_of(counts, columns, values, capacity), full): assert some.items() <= every.items()

def test_one_row_takes_all(device, guard):
    q, K = rand(20, 5, device=device), rand(150, 5, seed=1, device=device)
    bound = torch.full((20,), inf, device=device); bound[7] = -inf
    assert [sorted(r) for r in entries(q, K, None, bound)] == [[]]*7 + [list(range(150))] + [[]]*12

def test_what_is_never_taken(device, guard):
    "Scores of -inf and NaN; neighbours of theirs are."
    q, K, bias = rand(3, 8, device=device), rand(40, 8, seed=1, device=device), torch.zeros(40, device=device)
    K[3], bias[5], bias[6] = nan, -inf, inf
    counts, columns, values = above(q, K, bias, torch.tensor([-inf, inf, nan], device=device), 40)
    a, b, c = rows_of(counts, columns, values, 40)
    assert sorted(a) == [i for i in range(40) if i not in (3, 5)] and a[6] == inf and b == {6: inf} and c == {}

def test_more_than_one_band_of_tiles(device, guard):
    N, M = (560, 140) if INTERPRETED else (4500, 700)
    q, K = rand(N, 5, device=device, whole=True), rand(M, 5, seed=1, device=device, whole=True)
    bound = (q @ K.T).topk(7).values[:, -1]
    assert entries(q, K, None, bound) == rows_of(*above_reference(q, K, None, bound, M), M)


# ---- sparse products ----
COUNTS = {"some": [3, 0, 17, 1, 16, 0], "none": [0, 0, 0], "one holds all": [0, 100, 0], "first": [5], "long": [2, 700, 0]}
some_counts = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)

@floats
@some_counts
def test_spmm(counts, dtype, device, guard):
    for i, (d, ids) in enumerate(((1, torch.int64), (7, torch.int32), (130, torch.int64), (1030, torch.int64))):
        W = rand(50, d, seed=i, dtype=dtype, device=device)
        indices, offsets = pattern(counts, 50, i, device, ids)
        v = rand(len(indices), seed=9, device=device)
        out = spmm(v, indices, offsets, W)
        assert out.dtype == dtype and torch.equal(out, spmm(v, indices, offsets, W))
        close(out, spmm_reference(*wide(v, indices, offsets, W)), dtype, scale=30)
        assert (out[offsets.diff() == 0] == 0).all()

@floats
@some_counts
def test_spmm_pair(counts, dtype, device, guard):
    for i, d in enumerate((3, 40, 1030)):
        q1, q2 = rand(50, d, seed=i, dtype=dtype, device=device), rand(50, d, seed=5, dtype=dtype, device=device)
        indices, offsets = pattern(counts, 50, i, device)
        v1, v2 = rand(len(indices), seed=9, device=device), rand(len(indices), seed=8, dtype=dtype, device=device)
        out = spmm_pair(v1, q1, v2, q2, indices, offsets)
        assert out.dtype == dtype and torch.equal(out, spmm_pair(v1, q1, v2, q2, indices, offsets))
        close(out, spmm_pair_reference(*wide(v1, q1, v2, q2, indices, offsets)), dtype, scale=30)

def test_unused_rows_may_hold_anything(device):
    W, (indices, offsets) = rand(50, 20, device=device), pattern([4, 0, 9], 50, device=device)
    indices, W[0] = indices.clamp(min=1), nan
    v = rand(13, seed=2, device=device)
    assert spmm(v, indices, offsets, W).isfinite().all() and spmm_pair(v, W, v, W, indices, offsets).isfinite().all()

def test_spmm_pair_of_two_dtypes(device, guard):
    q1, q2, (indices, offsets) = rand(50, 20, dtype=torch.bfloat16, device=device), rand(50, 20, seed=1, device=device), pattern([4, 0, 9], 50, device=device)
    v1, v2 = rand(13, seed=2, device=device), rand(13, seed=3, device=device)
    out = spmm_pair(v1, q1, v2, q2, indices, offsets)
    assert out.dtype == torch.float32
    close(out, spmm_pair_reference(*wide(v1, q1, v2, q2, indices, offsets)), scale=10)

@floats
@pytest.mark.parametrize("nnz", [0, 1, 16, 17, 100])
def test_sdd(nnz, dtype, device, guard):
    for i, (d, ids) in enumerate(((1, torch.int64), (7, torch.int32), (130, torch.int64), (600, torch.int64))):
        q, K = rand(9, d, dtype=dtype, device=device), rand(50, d, seed=1, dtype=dtype if i else torch.float32, device=device)
        rows, indices = pattern([nnz], 9, i, device, ids)[0], pattern([nnz], 50, i + 7, device, ids)[0]
        out = sdd(q, K, rows, indices)
        assert out.dtype == torch.float32
        close(out, sdd_reference(*wide(q, K, rows, indices)), scale=60)

def test_sparse_products_of_strided_matrices(device):
    W, (indices, offsets) = rand(30, 50, device=device), pattern([4, 0, 9], 50, device=device)
    v = rand(26, device=device)[::2]
    assert torch.equal(spmm(v, indices, offsets, W.T), spmm(v.contiguous(), indices, offsets, W.T.contiguous()))
    rows = torch.arange(13, device=device)
    assert torch.equal(sdd(W.T, W.T, rows, indices), sdd(W.T.contiguous(), W.T.contiguous(), rows, indices))
    assert torch.equal(spmm_pair(v, W.T, v, W.T, indices, offsets), spmm_pair(v, W.T.contiguous(), v, W.T.contiguous(), indices, offsets))

def test_no_width(device):
    indices, offsets = pattern([2, 1], 5, device=device)
    assert spmm(rand(3, device=device), indices, offsets, rand(5, 0, device=device)).shape == (2, 0)
    assert torch.equal(sdd(rand(2, 0, device=device), rand(5, 0, device=device), indices.clamp(max=1), indices), torch.zeros(3, device=device))


# ---- large, on a GPU ----
@pytest.mark.cuda
@floats
def test_large_scores(dtype):
    q, K, bias = rand(1000, 768, dtype=dtype, device="cuda"), rand(20011, 768, seed=1, dtype=dtype, device="cuda"), rand(20011, seed=2, device="cuda")
    s = q.double() @ K.double().T + bias
    close(group_maxima(q, K, bias), group_maxima_reference(*wide(q, K, bias)), scale=1000)
    bound, margin = s.topk(100).values[:, -1].float(), 1e-3
    counts, columns, _ = above(q, K, bias, bound, 256)
    assert counts.max() <= 256
    rows, place = (torch.arange(256, device="cuda") < counts[:, None]).nonzero().T
    taken = torch.zeros_like(s, dtype=torch.bool)
    taken[rows, columns[rows, place].long()] = True
    assert taken.sum() == counts.sum() and taken[s >= bound[:, None] + margin].all() and not taken[s < bound[:, None] - margin].any()

@pytest.mark.cuda
@floats
def test_large_products(dtype):
    counts = torch.randint(0, 60, (3000,), generator=torch.Generator().manual_seed(0)); counts[5] = 20000
    indices, offsets = pattern(counts.tolist(), 20011, device="cuda")
    W, q, v = rand(20011, 768, dtype=dtype, device="cuda"), rand(3000, 768, seed=1, dtype=dtype, device="cuda"), rand(len(indices), seed=2, device="cuda")
    out = spmm(v, indices, offsets, W)
    close(out, spmm_reference(*wide(v, indices, offsets, W)), dtype, scale=1000)
    assert torch.equal(out, spmm(v, indices, offsets, W))
    rows = torch.arange(3000, device="cuda").repeat_interleave(offsets.diff())
    close(sdd(q, W, rows, indices), sdd_reference(*wide(q, W, rows, indices)), scale=1000)

@pytest.mark.cuda
def test_addresses_beyond_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 24e9: pytest.skip("needs 24 GB")
    M, d = 540_000, 4096                                           # more than 2**31 numbers
    W = torch.zeros(M, d, dtype=torch.bfloat16, device="cuda"); W[-1] = 1; W[-2] = 2
    q = torch.ones(1, d, dtype=torch.bfloat16, device="cuda")
    last = torch.tensor([M - 1, M - 2], device="cuda")
    assert (spmm(torch.ones(2, device="cuda"), last, torch.tensor([0, 2], device="cuda"), W) == 3).all()
    assert sdd(q, W, torch.zeros(2, dtype=torch.int64, device="cuda"), last).tolist() == [d, 2*d]
    assert group_maxima(q, W)[0, -1] == 2*d and sorted(entries(q, W, None, torch.ones(1, device="cuda"), 8)[0]) == [M - 2, M - 1]


# ---- what can be said on any machine ----
def test_references_agree_with_each_other():
    q, K, bias, W = rand(6, 9, whole=True), rand(50, 9, seed=1, whole=True), rand(50, seed=2, whole=True), rand(50, 4, seed=3)
    s = q @ K.T + bias
    assert torch.equal(group_maxima_reference(q, K, bias, 7), torch.stack([x.amax(1) for x in s.split(7, 1)], 1))
    bound = s.topk(5).values[:, -1]
    hit = s >= bound[:, None]
    indices, offsets = hit.nonzero()[:, 1], torch.nn.functional.pad(hit.sum(1).cumsum(0), (1, 0))
    counts, columns, values = above_reference(q, K, bias, bound, 50)
    rows = library._rows(offsets)
    assert torch.equal(counts, offsets.diff().int()) and torch.equal(torch.cat([c[:n] for c, n in zip(columns, counts)]).long(), indices)
    assert torch.equal(torch.cat([c[:n] for c, n in zip(values, counts)]), s[rows, indices])
    assert above_reference(q, K, bias, bound, 60)[1].shape == above_reference(q, K, bias, bound, 60)[2].shape == (6, 60)
    assert torch.equal(sdd_reference(q, K, rows, indices) + bias[indices], s[rows, indices])
    z = torch.zeros_like(s).index_put((rows, indices), s[rows, indices])
    torch.testing.assert_close(spmm_reference(s[rows, indices], indices, offsets, W), z @ W)
    torch.testing.assert_close(spmm_pair_reference(s[rows, indices], W, s[rows, indices], W, indices, offsets), 2*z @ W)
    for t in (torch.bfloat16, torch.float16): assert spmm_reference(s[rows, indices], indices, offsets, W.to(t)).dtype == t

@pytest.mark.parametrize("call,error,match", [
    (lambda q, K, i, o: group_maxima(q, K.T), ValueError, r"\(M, d\)"), (lambda q, K, i, o: group_maxima(q[0], K), ValueError, r"\(N, d\)"),
    (lambda q, K, i, o: group_maxima(q, K.half()), TypeError, "must be the same"), (lambda q, K, i, o: group_maxima(q.double(), K.double()), TypeError, "float64"),
    (lambda q, K, i, o: group_maxima(q, K, q[0]), ValueError, "7 rows of K"), (lambda q, K, i, o: group_maxima(q, K, group=128), ValueError, "power of two"),
    (lambda q, K, i, o: above(q, K, None, q[:, :1], 4), ValueError, "bound"), (lambda q, K, i, o: spmm(q[0], i, o, K), ValueError, r"\(nnz,\)"),
    (lambda q, K, i, o: spmm(q.view(-1)[:3], i, o, K[0]), ValueError, r"\(M, d\)"), (lambda q, K, i, o: spmm(q.view(-1)[:3], i, o[:0], K), ValueError, "offsets"),
    (lambda q, K, i, o: spmm(q.view(-1)[:3], i, o, K.long()), TypeError, "int64"), (lambda q, K, i, o: spmm_pair(q.view(-1)[:3], K, q.view(-1)[:3], q, i, o), ValueError, "both must"),
    (lambda q, K, i, o: sdd(q, K, i[:2], i), ValueError, r"\(nnz,\)"), (lambda q, K, i, o: sdd(q, K[:, 1:], i, i), ValueError, r"\(M, d\)")])
def test_errors(call, error, match):
    with pytest.raises(error, match=match): call(rand(4, 5), rand(7, 5), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3]))

def test_the_module_does_not_hide_the_package():
    assert library.triton is None or (library.triton is not library and library.triton.__name__ == "triton" and hasattr(library.triton, "jit"))

CALLS = """
q, K, v, i, o = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2), torch.tensor([0, 1]), torch.tensor([0, 1, 2])
calls = [lambda: t.group_maxima(q, K), lambda: t.above(q, K, None, v, 3), lambda: t.spmm(v, i, o, K),
         lambda: t.spmm_pair(v, K, v, K, i, o), lambda: t.sdd(q, K, i, i)]
for call in calls:
    try: call()
    except RuntimeError as e: assert why in str(e) and "_reference" in str(e), e
    else: raise AssertionError("should have failed")
assert not t.available(q) and t.group_maxima_reference(q, K).tolist() == [[3.], [3.]]
"""

@outside
@pytest.mark.parametrize("why,start", [("triton is not installed", "import sys; sys.modules['triton'] = None"), ("the tensors are on cpu", "")])
def test_where_nothing_can_run_a_call_says_so(why, start):
    if "cpu" in why and library.triton is None: pytest.skip("needs triton")
    script = f"import torch; {start}\nwhy = {why!r}\nfrom sparsemax_sae.ops import triton as t{CALLS}"
    r = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

@needs_triton
def test_availability():
    assert available(torch.ones(1)) == INTERPRETED

@needs_triton
@outside
def test_under_the_interpreter():
    r = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=3", __file__], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert r.returncode == 0, r.stdout[-6000:] + r.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", r.stdout)[1]) > 90, r.stdout[-500:]


def compile_all():
    """Call every function with Triton's launch replaced by compilation for a GPU that need not be there.

    For each kernel, target, dtype and layout: does it use the tensor cores (Hopper's own on Hopper), bytes of shared memory, bytes spilled by a thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    class Absent:
        def __init__(self, target): self.get_current_target = lambda: GPUTarget("cuda", target, 32)
        get_current_device = get_current_stream = lambda *_: 0
    compiled, run = {}, triton.JITFunction.run
    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tensor_cores = ("wgmma" if target == 90 else "mma.sync") in kernel.asm["ptx"]
        compiled[f"{name} {self.fn.__name__}"] = tensor_cores, kernel.metadata.shared, spilled(kernel.asm["cubin"], os.path.dirname(triton.__file__))
    triton.JITFunction.run, library.available = compile_only, lambda x: True
    full, half = torch.float32, torch.bfloat16
    for target, dtype, layout in [(90, full, "aligned"), (90, full, "odd"), (90, half, "aligned"), (90, half, "odd"), (90, half, "transposed"),
                                  (90, torch.float16, "aligned"), (80, half, "aligned"), (89, half, "aligned")]:
        driver.set_active(Absent(target))
        for kernel in vars(library).values():
            if isinstance(kernel, triton.JITFunction): kernel.device_caches.clear()
        name, d = f"{target} {str(dtype)[6:]} {layout}", 37 if layout == "odd" else 768
        q, K, v = torch.empty(64, d, dtype=dtype), torch.empty(512, d, dtype=dtype), torch.empty(16, dtype=torch.float32)
        if layout == "transposed": K = torch.empty(d, 512, dtype=dtype).T
        indices, offsets = torch.zeros(16, dtype=torch.int64), torch.zeros(17, dtype=torch.int64)
        group_maxima(q, K, None if layout == "odd" else torch.empty(512))
        above(q, K, None, torch.empty(64), 256)
        sdd(q, K, indices, indices)
        spmm_pair(v, K, v, K, indices, offsets)
        compiled[f"{name} _spmm_pair"] = compiled.pop(f"{name} _spmm")
        spmm(v, indices, offsets, K)
    return compiled

def spilled(cubin, triton_home):
    "Bytes of local memory that a thread uses, as CUDA's own tool reports them; 0 where Triton does not carry it."
    tool, file = os.path.join(triton_home, "backends", "nvidia", "bin", "cuobjdump"), os.path.join(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    if not os.path.exists(tool): return 0
    with open(file, "wb") as f: f.write(cubin)
    return int(re.search(r"STACK:(\d+)", subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True).stdout)[1])

@needs_triton
@outside
@pytest.mark.slow
def test_compiles_without_a_gpu(tmp_path):
    "What the interpreter does not check: types, layouts, block shapes, registers, shared memory. For H100, A100 and consumer GPUs."
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    r = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-4000:]
    compiled = json.loads(r.stdout.splitlines()[-1])
    assert len(compiled) == 8*5
    for name, (tensor_cores, shared, spill) in compiled.items():
        target, dtype, layout, kernel = name.split()
        assert tensor_cores == (kernel in ("_group_maxima", "_above") and dtype != "float32"), name
        assert shared <= {"80": 163, "89": 99, "90": 227}[target]*1024, (name, shared)
        if layout != "odd": assert spill <= 64, (name, spill)                  # unaligned half precision is read number by number

if __name__ == "__main__": print(json.dumps(compile_all()))
