// Command example exports a dataset as CSV, watches the export, and downloads and verifies
// the file.
//
//	example [DATASET [PATH]]
//
// The server's host:port comes from EXPORTD_SERVER (localhost:50051), the API key from
// EXPORTD_TOKEN, the PEM file of the server's authority from EXPORTD_CA_CERT; without the
// latter it speaks plaintext.
package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"

	"exportd.internal/go/exportd"
	exportdv1 "exportd.internal/go/exportd/v1"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	address := cmp.Or(os.Getenv("EXPORTD_SERVER"), "localhost:50051")
	dataset := argument(1, "positions")
	path := argument(2, dataset+".csv")

	transport := exportd.WithPlaintext()
	if ca := os.Getenv("EXPORTD_CA_CERT"); ca != "" {
		transport = exportd.WithCAFile(ca)
	}
	options := []exportd.Option{transport}
	if key := os.Getenv("EXPORTD_TOKEN"); key != "" {
		options = append(options, exportd.WithToken(key))
	}
	client, err := exportd.NewClient(address, options...)
	if err != nil {
		return err
	}
	defer client.Close()

	created, err := client.CreateExport(ctx, &exportdv1.CreateExportRequest{
		Dataset: dataset, Format: exportdv1.Format_FORMAT_CSV,
	})
	if err != nil {
		return err
	}
	id := created.GetJob().GetJobId()
	fmt.Println("job", id)
	for job, err := range client.Watch(ctx, id) {
		if err != nil {
			return err
		}
		fmt.Println(job.GetState(), job.GetProgress().GetRows(), "rows")
	}
	// Of a job that failed or was cancelled, Download says so.
	file, err := client.Download(ctx, id, path, exportd.WithProgress(func(done, total int64) {
		fmt.Printf("\r%d of %d bytes", done, total)
	}))
	if err != nil {
		return err
	}
	fmt.Printf("\n%s: %d bytes, verified by %s\n", file.Path, file.Bytes, file.VerifiedBy)
	return nil
}

func argument(index int, otherwise string) string {
	if len(os.Args) > index {
		return os.Args[index]
	}
	return otherwise
}
