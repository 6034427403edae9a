"""What evaluation measures: likelihood methods, their estimators, and the report."""
