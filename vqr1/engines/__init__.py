"""The engines that a policy answers through: transformers, and vLLM."""
