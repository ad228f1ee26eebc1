"""The ext_proc service: reads requests as Envoy shows them, waits for the owner's stager, answers with where to go."""
