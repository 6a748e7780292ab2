"""Speed and memory of pruned training against the limit that its retained tokens set (docs/performance.md)."""
