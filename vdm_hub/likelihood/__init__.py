"""What evaluation measures: likelihood methods, their estimators, what lowers their variance, and the report."""
