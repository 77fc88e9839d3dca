"""What a run shows of itself: report, page, trackers."""
