// Command driver makes the calls that the tests of all clients ask for.
//
//	driver get JOB_ID
//	driver watch JOB_ID
//	driver create DATASET FORMAT
//	driver download JOB_ID PATH [--part N] [--overwrite]
//
// It prints one JSON object a line. EXPORTD_SERVER is the server's host:port,
// EXPORTD_TOKEN its key, EXPORTD_CA_CERT a PEM file (absent: plaintext).
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"exportd.internal/go/exportd"
	exportdv1 "exportd.internal/go/exportd/v1"
)

type object map[string]any

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		print(object{"error": describe(err)})
		os.Exit(1)
	}
}

func run(ctx context.Context, arguments []string) error {
	if len(arguments) < 2 {
		return errors.New("give a command (get, watch, create, download) and what it takes")
	}
	client, err := connect()
	if err != nil {
		return err
	}
	defer client.Close()
	switch command, rest := arguments[0], arguments[1:]; command {
	case "get":
		response, err := client.GetJob(ctx, &exportdv1.GetJobRequest{JobId: rest[0]})
		if err != nil {
			return err
		}
		print(object{"state": response.GetJob().GetState().String()})
		return nil
	case "watch":
		for job, err := range client.Watch(ctx, rest[0]) {
			if err != nil {
				return err
			}
			print(object{"state": job.GetState().String()})
		}
		return nil
	case "create":
		return create(ctx, client, rest)
	case "download":
		return download(ctx, client, rest)
	default:
		return fmt.Errorf("command %q is none of get, watch, create, download", command)
	}
}

func connect() (*exportd.Client, error) {
	transport := exportd.WithPlaintext()
	if ca := os.Getenv("EXPORTD_CA_CERT"); ca != "" {
		transport = exportd.WithCAFile(ca)
	}
	options := []exportd.Option{transport}
	if key, given := os.LookupEnv("EXPORTD_TOKEN"); given {
		options = append(options, exportd.WithToken(key))
	}
	return exportd.NewClient(os.Getenv("EXPORTD_SERVER"), options...)
}

func create(ctx context.Context, client *exportd.Client, arguments []string) error {
	if len(arguments) != 2 {
		return errors.New("create takes DATASET FORMAT")
	}
	format, known := exportdv1.Format_value[arguments[1]]
	if !known {
		return fmt.Errorf("format %q is none of FORMAT_CSV, FORMAT_JSONL, FORMAT_PARQUET, FORMAT_ARROW", arguments[1])
	}
	response, err := client.CreateExport(ctx, &exportdv1.CreateExportRequest{
		Dataset: arguments[0], Format: exportdv1.Format(format),
	})
	if err != nil {
		return err
	}
	print(object{"job_id": response.GetJob().GetJobId()})
	return nil
}

func download(ctx context.Context, client *exportd.Client, arguments []string) error {
	flags := flag.NewFlagSet("download", flag.ContinueOnError)
	part := flags.Int("part", -1, "index of the one part to download")
	overwrite := flags.Bool("overwrite", false, "replace a file that is there")
	if len(arguments) < 2 {
		return errors.New("download takes JOB_ID PATH")
	}
	if err := flags.Parse(arguments[2:]); err != nil {
		return err
	}
	var options []exportd.DownloadOption
	if *part >= 0 {
		options = append(options, exportd.WithPart(int32(*part)))
	}
	if *overwrite {
		options = append(options, exportd.WithOverwrite())
	}
	started := time.Now()
	file, err := client.Download(ctx, arguments[0], arguments[1], options...)
	if err != nil {
		return err
	}
	print(object{
		"path": file.Path, "bytes": file.Bytes, "sha256": file.SHA256,
		"verified_by": file.VerifiedBy, "seconds": time.Since(started).Seconds(),
	})
	return nil
}

func describe(err error) object {
	code := ""
	message := err.Error()
	if s, ok := status.FromError(err); ok {
		code, message = codeName(s.Code()), s.Message()
	}
	return object{
		"code": code, "reason": exportd.Reason(err), "message": message, "type": fmt.Sprintf("%T", err),
	}
}

// codeName is the canonical name of a code, such as NOT_FOUND for codes.NotFound.
func codeName(code codes.Code) string {
	if code == codes.Canceled {
		return "CANCELLED"
	}
	var name strings.Builder
	for i, r := range code.String() {
		if i > 0 && 'A' <= r && r <= 'Z' {
			name.WriteByte('_')
		}
		name.WriteRune(r)
	}
	return strings.ToUpper(name.String())
}

func print(o object) {
	if err := json.NewEncoder(os.Stdout).Encode(o); err != nil {
		panic(err)
	}
}
