// Swagger UI on openapi.json. Every address is relative, so that it works behind a prefix.
const ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  onComplete() {
    const key = sessionStorage.getItem("key"); // the live page keeps it there
    if (key) ui.preauthorizeApiKey("bearer", key);
  },
});
