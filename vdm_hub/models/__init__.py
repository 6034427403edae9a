"""Networks, and schedules that have weights at inference."""
