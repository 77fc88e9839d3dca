"""The model taken elsewhere: transformers, llama.cpp and what is built on them."""
