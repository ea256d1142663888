"""Pure arithmetic: partition of tensors into segments, exact reduction in rank order. No IO."""
