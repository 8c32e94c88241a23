"""Proof without a GPU: what compilers make of the Triton kernels, for GPUs that need not be there.

`sass` reads machine code, `mix` counts what it does, `model` says how near to the peak that can come, `work` knows
what the loops are for, `compiled` compiles, `cases` chooses what, `budgets` compares with the committed table.
"""
