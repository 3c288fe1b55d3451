"""Plans: a document resolved against one model."""
