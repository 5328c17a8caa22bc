"""What people look at: progress, status, contact sheets."""
