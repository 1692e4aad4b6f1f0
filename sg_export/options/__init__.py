"""Options of a build, which refuse what cannot be built before any work. Without torch."""
