"""How a model is spread over ranks: the strategies, the mesh and the worker; imports torch only."""
