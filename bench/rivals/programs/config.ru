word, number = File.read(ENV["RELEASE"]).split
abort "this release is broken" if word == "broken"
sleep 1.5 if word == "slow"
status, said = word == "answers-500" ? [500, "fail"] : [200, "pong"]
run lambda { |_|
  body = "#{Process.pid} #{number} #{said}"
  [status, { "Content-Type" => "text/plain", "Content-Length" => body.bytesize.to_s }, [body]]
}
