"""The selective scan's Triton kernels, imported when one of them is first needed."""
