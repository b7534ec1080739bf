"""The attention plan: which query rows read which runs of KV chunks.

numpy only; knows no tree, no request, no tensor. One format for every backend (reference, C++, CUDA, emulator).
"""
