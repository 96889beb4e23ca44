"""A GGUF file in llama.cpp and in k2lite: the same tokens, and where not, why."""
