"""``python -m spectral_ops``."""

from spectral_ops.cli import main

raise SystemExit(main())
