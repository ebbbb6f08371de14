/**
 * Downloads that resume and verify, and watches that survive a restart of the server; for all else
 * there are the stubs in {@code exportd.v1}. Begin with {@link exportd.client.ExportdClient}.
 */
package exportd.client;
