import torch
from sparsemax_sae.ops.codes import counts_to_offsets
def _sel(m): return m.nonzero()[:,1], counts_to_offsets(m.sum(1))
def topk(s,k):
    v,i=s.topk(k,1); return torch.zeros_like(s).scatter(1,i,v.relu())
def topk_select(s,k): return _sel(topk(s,k)!=0)
def batch_topk(s,k):
    r=s.relu(); n=min(r.numel(),k*len(r))
    if n==0: return r
    t=r.detach().flatten().topk(n).values[-1]; return r*((r>=t)&(r>0))
def batch_topk_select(s,k): return _sel(batch_topk(s,k)!=0)
def smallest_active(v):
    v=v[v>0]; return v.min() if len(v) else torch.tensor(float("inf"))
