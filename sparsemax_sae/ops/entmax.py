from entmax import entmax15 as _e
def entmax15(s,dim=-1): return _e(s,dim)
