package exportd

import (
	"context"
	"crypto/sha256"
	"hash/crc32"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	exportdv1 "exportd.internal/go/exportd/v1"
)

const jobID = "01890a5d-ac96-774b-bcce-b302099a8057"

type stream = grpc.ServerStreamingServer[exportdv1.StreamDownloadResponse]

// fake is a server of one finished job. Each download takes the next of its faults first;
// without one it is served whole.
type fake struct {
	exportdv1.UnimplementedExportServiceServer
	mu       sync.Mutex
	job      *exportdv1.Job
	content  []byte
	faults   []func(*exportdv1.StreamDownloadRequest, stream) error
	requests []*exportdv1.StreamDownloadRequest
	watches  []func(grpc.ServerStreamingServer[exportdv1.WatchJobResponse]) error
	getJob   func(context.Context) error // asked before the job is given

	untilDelivered bool // of the last watch
}

// chunk is how many bytes the fake server sends in a message.
const chunk = 1000

// newFake joins parts, each of which begins with as many bytes of a header and ends with
// as many of a trailer.
func newFake(prefix, suffix int, parts ...string) *fake {
	f := &fake{}
	manifest := &exportdv1.Manifest{Joinable: true, FileName: "positions.csv"}
	for i, part := range parts {
		sum := sha256.Sum256([]byte(part))
		manifest.Parts = append(manifest.Parts, &exportdv1.Part{
			Index: int32(i), Bytes: int64(len(part)), Sha256: sum[:],
			Crc32C: crc32.Checksum([]byte(part), castagnoli), FileName: "part.csv",
			PrefixBytes: int64(prefix), SuffixBytes: int64(suffix),
		})
		if i > 0 {
			part = part[prefix:]
		}
		if i < len(parts)-1 {
			part = part[:len(part)-suffix]
		}
		f.content = append(f.content, part...)
	}
	manifest.Bytes = int64(len(f.content))
	manifest.Crc32C = crc32.Checksum(f.content, castagnoli)
	if len(parts) == 1 {
		manifest.Sha256 = manifest.GetParts()[0].GetSha256()
	}
	f.job = &exportdv1.Job{
		JobId: jobID, State: exportdv1.JobState_JOB_STATE_SUCCEEDED, Generation: 1, Manifest: manifest,
	}
	return f
}

// serve starts the server on loopback and gives a client of it.
func (f *fake) serve(t *testing.T) *Client {
	t.Helper()
	client, err := NewClient(f.listen(t), WithPlaintext())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// listen starts the server on loopback and gives its address.
func (f *fake) listen(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	exportdv1.RegisterExportServiceServer(server, f)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

func (f *fake) GetJob(ctx context.Context, _ *exportdv1.GetJobRequest) (*exportdv1.GetJobResponse, error) {
	if f.getJob != nil {
		if err := f.getJob(ctx); err != nil {
			return nil, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return &exportdv1.GetJobResponse{Job: proto.CloneOf(f.job)}, nil
}

func (f *fake) StreamDownload(request *exportdv1.StreamDownloadRequest, to stream) error {
	f.mu.Lock()
	f.requests = append(f.requests, request)
	var fault func(*exportdv1.StreamDownloadRequest, stream) error
	if len(f.faults) > 0 {
		fault, f.faults = f.faults[0], f.faults[1:]
	}
	generation := f.job.GetGeneration()
	f.mu.Unlock()
	if fault != nil {
		return fault(request, to)
	}
	if wanted := request.GetIfGenerationMatch(); wanted != 0 && wanted != generation {
		return refused(codes.FailedPrecondition, "GENERATION_MISMATCH")
	}
	return f.send(request, to, int64(len(f.content)))
}

// send sends the bytes from the offset asked for up to end.
func (f *fake) send(request *exportdv1.StreamDownloadRequest, to stream, end int64) error {
	err := to.Send(&exportdv1.StreamDownloadResponse{Metadata: &exportdv1.DownloadMetadata{
		Generation: f.job.GetGeneration(), TotalBytes: proto.Int64(int64(len(f.content))),
	}})
	for offset := request.GetReadOffset(); err == nil && offset < end; offset += chunk {
		data := f.content[offset:min(offset+chunk, end)]
		err = to.Send(&exportdv1.StreamDownloadResponse{
			Offset: offset, Data: data, Crc32C: crc32.Checksum(data, castagnoli),
		})
	}
	return err
}

// cutAfter sends up to byte end and then ends the stream with err.
func (f *fake) cutAfter(end int64, err error) func(*exportdv1.StreamDownloadRequest, stream) error {
	return func(request *exportdv1.StreamDownloadRequest, to stream) error {
		if sent := f.send(request, to, end); sent != nil {
			return sent
		}
		return err
	}
}

// hangAfter sends up to byte end and then says nothing more.
func (f *fake) hangAfter(end int64) func(*exportdv1.StreamDownloadRequest, stream) error {
	return func(request *exportdv1.StreamDownloadRequest, to stream) error {
		if err := f.send(request, to, end); err != nil {
			return err
		}
		<-to.Context().Done()
		return to.Context().Err()
	}
}

func (f *fake) WatchJob(request *exportdv1.WatchJobRequest, to grpc.ServerStreamingServer[exportdv1.WatchJobResponse]) error {
	f.mu.Lock()
	f.untilDelivered = request.GetUntilDelivered()
	next := f.watches[0]
	f.watches = f.watches[1:]
	f.mu.Unlock()
	return next(to)
}

func (f *fake) offsets() (offsets []int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, request := range f.requests {
		offsets = append(offsets, request.GetReadOffset())
	}
	return offsets
}

// refused is an answer of exportd's.
func refused(code codes.Code, reason string) error { return refusedBy("exportd", code, reason) }

func refusedBy(domain string, code codes.Code, reason string) error {
	s, err := status.New(code, "["+reason+"]").WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: domain})
	if err != nil {
		return err
	}
	return s.Err()
}

// later is an answer of exportd's that says when to come back.
func later(code codes.Code, reason string, delay time.Duration) error {
	s, err := status.New(code, "["+reason+"]").WithDetails(
		&errdetails.ErrorInfo{Reason: reason, Domain: "exportd"},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(delay)},
	)
	if err != nil {
		return err
	}
	return s.Err()
}

// watchStub is a server that is watched without a network: each stream is made by open.
type watchStub struct {
	exportdv1.ExportServiceClient
	open    func(ctx context.Context) func() (*exportdv1.WatchJobResponse, error)
	streams int
}

func (s *watchStub) WatchJob(
	ctx context.Context, _ *exportdv1.WatchJobRequest, _ ...grpc.CallOption,
) (grpc.ServerStreamingClient[exportdv1.WatchJobResponse], error) {
	s.streams++
	return &stubStream{receive: s.open(ctx)}, nil
}

type stubStream struct {
	grpc.ClientStream
	receive func() (*exportdv1.WatchJobResponse, error)
}

func (s *stubStream) Recv() (*exportdv1.WatchJobResponse, error) { return s.receive() }

// end is what the watch ends with.
func (s *watchStub) end(t *testing.T) (last error) {
	t.Helper()
	client := &Client{streams: s, stall: stallTimeout}
	for _, err := range client.Watch(t.Context(), jobID) {
		last = err
	}
	return last
}
