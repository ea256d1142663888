"""One adapter per network thing: signed HTTP control plane and the bulk stream."""
