"""The benchmarks, see README.md. A regular package: opacus installs one of the same name, which would come first."""
