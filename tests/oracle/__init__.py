"""Float64 references that judge every backend. Written from the specifications, never from an implementation."""
