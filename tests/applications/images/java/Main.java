import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/** A key-value store in memory, with a job that runs ten times a second. */
public class Main {
    public static void main(String[] words) throws Exception {
        var kept = new ConcurrentHashMap<String, String>();
        var ticks = new AtomicLong();
        Executors.newScheduledThreadPool(1).scheduleAtFixedRate(ticks::incrementAndGet, 100, 100, TimeUnit.MILLISECONDS);
        var server = HttpServer.create(new InetSocketAddress(8080), 0);
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.createContext("/", exchange -> {
            var key = exchange.getRequestURI().getPath();
            if (exchange.getRequestMethod().equals("PUT")) {
                kept.put(key, new String(exchange.getRequestBody().readAllBytes()));
            }
            var answer = (key.equals("/ticks") ? ticks.toString() : kept.getOrDefault(key, "")).getBytes();
            exchange.sendResponseHeaders(200, answer.length == 0 ? -1 : answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.start();
    }
}
