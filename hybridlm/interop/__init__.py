"""Published models in and out: files, folders and families of published layouts."""
